"""How good each image of a batch is and how a codebook is used; pure and jitted."""

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.similarity import ms_ssim, ssim

__all__ = [
    "code_entropy",
    "codebook_usage",
    "hfen",
    "mae",
    "masked_mean",
    "ms_ssim",
    "perceptual_distance",
    "perplexity",
    "psnr",
    "ssim",
]

# Ravishankar and Bresler 2011, section III-A: 15 x 15 pixels, standard deviation 1.5 pixels.
HFEN_SIZE = 15
HFEN_SIGMA = 1.5


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
    error = _norm_per_image(_laplacian_of_gaussian(a - b))
    norm = _norm_per_image(_laplacian_of_gaussian(b - b[:, :1, :1]))  # exactly 0 for an image of one value
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


@jax.jit
def code_entropy(counts: jax.Array) -> jax.Array:
    """Entropy of the codes in bits, -Σ p log2 p with p = counts / Σ counts: what a code costs an ideal entropy coder.

    Between 0 (one code) and log2 K (all alike). It depends on how many codes were drawn, so sum the counts over
    a whole split before calling it.

    Args:
      counts: [..., K], how often each code was chosen, as numbers or as shares.

    Returns:
      [...] float32; NaN where nothing was counted.
    """
    counts = jnp.asarray(counts, jnp.float32)
    share = counts / jnp.sum(counts, axis=-1, keepdims=True)
    return jnp.sum(share * jnp.log2(1 / jnp.where(share == 0, 1, share)), axis=-1)


@jax.jit
def perplexity(counts: jax.Array) -> jax.Array:
    """Effective number of codes in use, 2 to the power of `code_entropy`: between 1 (one code) and K (all alike).

    Args:
      counts: [..., K], how often each code was chosen over a whole split.

    Returns:
      [...] float32; 0 where nothing was counted, a value no used codebook can have.
    """
    return jnp.where(jnp.sum(jnp.asarray(counts), axis=-1) > 0, jnp.exp2(code_entropy(counts)), 0.0)


@jax.jit
def codebook_usage(counts: jax.Array) -> jax.Array:
    """Share of the codes chosen at least once, in [0, 1]: counts [..., K] -> [...]."""
    return jnp.mean(jnp.asarray(counts) > 0, axis=-1, dtype=jnp.float32)


@jax.jit
def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the values where the mask is true; what stands elsewhere, NaN included, has no influence.

    Args:
      values: any shape, one metric for each image as a rule ([N]).
      mask: the same shape; true (or nonzero) for real images, false for padding.

    Returns:
      [] float32; NaN for an empty mask, because any number would pass for a measurement.

    Raises:
      ValueError: the shapes differ.
    """
    values, mask = _same_shape(values, mask)
    kept = mask != 0
    return jnp.sum(jnp.where(kept, values, 0)) / jnp.sum(kept)


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


def _laplacian_of_gaussian(images: jax.Array) -> jax.Array:
    """[N, H, W] -> [N, H, W]."""
    reach = HFEN_SIZE // 2
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    kernel = jnp.asarray(_laplacian_kernel(), jnp.float32)
    exact = jax.lax.Precision.HIGHEST  # an accelerator's shortened products would not sum to 0
    return jax.lax.conv_general_dilated(padded[:, None], kernel[None, None], (1, 1), "VALID", precision=exact)[:, 0]


def _laplacian_kernel() -> np.ndarray:
    """[HFEN_SIZE, HFEN_SIZE]: the Laplacian of a Gaussian of sum 1, less its mean."""
    steps = np.arange(HFEN_SIZE) - HFEN_SIZE // 2
    squares = steps[:, None] ** 2 + steps**2
    gaussian = np.exp(-squares / (2 * HFEN_SIGMA**2))
    laplacian = gaussian / gaussian.sum() * (squares - 2 * HFEN_SIGMA**2) / HFEN_SIGMA**4
    return laplacian - laplacian.mean()
