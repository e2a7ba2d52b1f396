"""How good each image of a batch is; pure and jitted."""

import jax
import jax.numpy as jnp
import numpy as np

# Ravishankar and Bresler 2011, section III-A: 15 x 15 pixels, standard deviation 1.5 pixels.
HFEN_SIZE = 15
HFEN_SIGMA = 1.5
HFEN_REACH = HFEN_SIZE // 2


@jax.jit
def psnr(a: jax.Array, b: jax.Array, *, data_range: float = 1.0) -> jax.Array:
    """Peak signal-to-noise ratio of each pair of images in dB: 10 log10(R² / mean (a - b)²).

    Args:
      a, b: [N, ...] of one shape, computed in float32.
      data_range: R, the span of the intensities.

    Returns:
      [N] float32; inf for identical images.
    """
    a, b = _same_shape(a, b)
    return 10 * jnp.log10(data_range**2 / _mean_per_image((a - b) ** 2))


@jax.jit
def mae(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean absolute error, mean |a - b|, of each pair of images, in their unit: [N, ...] -> [N] float32."""
    a, b = _same_shape(a, b)
    return _mean_per_image(jnp.abs(a - b))


@jax.jit
def hfen(a: jax.Array, b: jax.Array) -> jax.Array:
    """High-frequency error norm of each pair of images, ‖LoG(a) - LoG(b)‖ / ‖LoG(b)‖: 0 for equal images, no unit.

    LoG is the Laplacian of a Gaussian, 15 x 15 with standard deviation 1.5 pixels, its coefficients brought to the
    sum 0 as by MATLAB's fspecial; at the border the image is mirrored, edge pixels twice ("reflect" in SciPy).

    Args:
      a: [N, H, W] or [N, H, W, 1], computed in float32.
      b: the original images, of the same shape.

    Returns:
      [N] float32; NaN where the original is of one value, so that there is nothing to relate an error to.

    Raises:
      ValueError: the shapes differ, or are none of the above.

    Reference: S. Ravishankar, Y. Bresler, "MR image reconstruction from highly undersampled k-space data by
    dictionary learning", IEEE Transactions on Medical Imaging 30(5), 2011.
    """
    a, b = _same_shape(a, b)
    if a.ndim == 4 and a.shape[-1] == 1:
        a, b = a[..., 0], b[..., 0]
    if a.ndim != 3:
        raise ValueError(f"hfen expects images [N, H, W] or [N, H, W, 1], got {a.shape}")
    error = _norm_per_image(laplacian_of_gaussian(_mirrored(a - b)))
    norm = _norm_per_image(laplacian_of_gaussian(_mirrored(b - b[:, :1, :1])))  # exactly 0 for an image of one value
    return jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), jnp.nan)


@jax.jit
def perceptual_distance(features: dict[str, jax.Array], target: dict[str, jax.Array]) -> jax.Array:
    """Mean absolute difference of each pair of images' features, averaged over layers: `losses.perceptual_loss`.

    Args:
      features: layer name to features [N, h, w, c] of the images.
      target: the same layers of the originals.

    Returns:
      [N] float32, in the unit of the features.
    """
    return jnp.mean(jnp.stack([mae(features[name], target[name]) for name in target]), axis=0)


def _same_shape(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as float32; broadcasting is refused since it would hide a mistake."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    if a.shape != b.shape:
        raise ValueError(f"expected two arrays of one shape, got {a.shape} and {b.shape}")
    return a, b


def _mean_per_image(values: jax.Array) -> jax.Array:
    """[N, ...] -> [N]."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _norm_per_image(values: jax.Array) -> jax.Array:
    """[N, ...] -> [N]."""
    return jnp.sqrt(jnp.sum(values**2, axis=tuple(range(1, values.ndim))))


def _mirrored(images: jax.Array) -> jax.Array:
    """[N, H, W] -> [N, H + 14, W + 14]: mirrored at the border, edge pixels twice."""
    return jnp.pad(images, ((0, 0), (HFEN_REACH, HFEN_REACH), (HFEN_REACH, HFEN_REACH)), mode="symmetric")


def laplacian_of_gaussian(images: jax.Array) -> jax.Array:
    """[N, H + 14, W + 14] -> [N, H, W]."""
    kernel = jnp.asarray(_laplacian_kernel(), jnp.float32)
    exact = jax.lax.Precision.HIGHEST  # an accelerator's shortened products would not sum to 0
    return jax.lax.conv_general_dilated(images[:, None], kernel[None, None], (1, 1), "VALID", precision=exact)[:, 0]


def _laplacian_kernel() -> np.ndarray:
    """[HFEN_SIZE, HFEN_SIZE]: the Laplacian of a Gaussian of sum 1, less its mean."""
    steps = np.arange(HFEN_SIZE) - HFEN_SIZE // 2
    squares = steps[:, None] ** 2 + steps**2
    gaussian = np.exp(-squares / (2 * HFEN_SIGMA**2))
    laplacian = gaussian / gaussian.sum() * (squares - 2 * HFEN_SIGMA**2) / HFEN_SIGMA**4
    return laplacian - laplacian.mean()
