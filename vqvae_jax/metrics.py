"""How good each image of a batch is (SSIM, PSNR, MAE) and how a codebook is used; pure and jitted."""

import jax
import jax.numpy as jnp

# Wang et al. 2004 for K1 and K2; the uniform 7 x 7 window is scikit-image's default.
SSIM_WINDOW = 7
SSIM_K1 = 0.01
SSIM_K2 = 0.03


@jax.jit
def ssim(a: jax.Array, b: jax.Array, *, data_range: float = 1.0) -> jax.Array:
    """Mean structural similarity of each pair of images: 1 for equal images, at most 1, no unit.

    SSIM = (2 μa μb + C1)(2 σab + C2) / ((μa² + μb² + C1)(σa² + σb² + C2)), C1 = (0.01 R)², C2 = (0.03 R)²,
    with μ and the sample (n - 1) covariances σ over every 7 x 7 window inside the image, then averaged.
    This is `skimage.metrics.structural_similarity` with its defaults, to 1e-5 of its float64 result.

    Args:
      a, b: [N, H, W] or [N, H, W, 1], computed in float32.
      data_range: R, the span of the intensities (1 for images in [0, 1]).

    Returns:
      [N] float32.

    Raises:
      ValueError: the shapes differ, are none of the above, or H or W is below 7.

    Reference: Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from error
    visibility to structural similarity", IEEE Transactions on Image Processing 13(4), 2004, equation 13.
    """
    a, b = _same_shape(a, b)
    if a.ndim == 4 and a.shape[-1] == 1:
        a, b = a[..., 0], b[..., 0]
    if a.ndim != 3:
        raise ValueError(f"ssim expects images [N, H, W] or [N, H, W, 1], got {a.shape}")
    if min(a.shape[1:]) < SSIM_WINDOW:
        raise ValueError(
            f"ssim needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels (its window), "
            f"got {a.shape[1]} x {a.shape[2]}"
        )

    mean_a, mean_b, var_a, var_b, cov = _window_moments(a, b)
    c1 = (SSIM_K1 * data_range) ** 2
    c2 = (SSIM_K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2))


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
def perplexity(counts: jax.Array) -> jax.Array:
    """Effective number of codes in use, exp(-Σ p log p) with p = counts / Σ counts and the natural logarithm.

    Between 1 (one code) and K (all alike). It depends on how many codes were drawn, so sum the counts over
    a whole split before calling it.

    Args:
      counts: [..., K], how often each code was chosen, as numbers or as shares.

    Returns:
      [...] float32; 0 where nothing was counted, a value no used codebook can have.
    """
    counts = jnp.asarray(counts, jnp.float32)
    total = jnp.sum(counts, axis=-1)
    share = counts / jnp.where(total > 0, total, 1)[..., None]
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1)), axis=-1)
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)


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


def _window_moments(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
    """Means of a and b, their sample variances and covariance in each window: five of [N, H - 6, W - 6].

    E[x²] - E[x]² cancels in float32 (an error of 1e-7 against C2 = 9e-4). The law of total covariance does
    not, and is separable: the covariance in a window is the mean of its rows' covariances plus the covariance
    of its rows' means. Rows before columns, since the gradient then takes half the time on a CPU.
    """
    mean_a, mean_b, *within = _line_moments(a, b, axis=2)
    within = [_line_mean(moment, axis=1) for moment in within]
    mean_a, mean_b, *between = _line_moments(mean_a, mean_b, axis=1)
    size = SSIM_WINDOW**2
    sample = size / (size - 1)
    return mean_a, mean_b, *(sample * (w + v) for w, v in zip(within, between, strict=True))


def _line_moments(a: jax.Array, b: jax.Array, *, axis: int) -> tuple[jax.Array, ...]:
    """Means, population variances and covariance of a and b in every run of 7 along one axis."""
    mean_a, mean_b = _line_mean(a, axis), _line_mean(b, axis)
    from_mean_a = [x - mean_a for x in _shifts(a, axis)]
    from_mean_b = [y - mean_b for y in _shifts(b, axis)]
    var_a = sum(x * x for x in from_mean_a) / SSIM_WINDOW
    var_b = sum(y * y for y in from_mean_b) / SSIM_WINDOW
    cov = sum(x * y for x, y in zip(from_mean_a, from_mean_b, strict=True)) / SSIM_WINDOW
    return mean_a, mean_b, var_a, var_b, cov


def _line_mean(x: jax.Array, axis: int) -> jax.Array:
    """Mean of every run of 7 along one axis, which shrinks by 6."""
    return sum(_shifts(x, axis)) / SSIM_WINDOW


def _shifts(x: jax.Array, axis: int) -> list[jax.Array]:
    """The 7 views that hold the first, second, ... member of every run of 7 along one axis."""
    runs = x.shape[axis] - SSIM_WINDOW + 1
    return [jax.lax.slice_in_dim(x, i, i + runs, axis=axis) for i in range(SSIM_WINDOW)]
