"""Structural similarity of images, at one scale (SSIM) and at several (MS-SSIM), with a fast gradient."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

# Wang et al. 2004 for K1 and K2; the uniform 7 x 7 window is scikit-image's default.
SSIM_WINDOW = 7
SSIM_K1 = 0.01
SSIM_K2 = 0.03

# Exponents of the scales from the finest to the coarsest: Wang, Simoncelli and Bovik 2003, section 3.2.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


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
    luminance, structure = similarity_maps(*_images(a, b, "ssim"), data_range)
    return jnp.mean(luminance * structure, axis=(1, 2))


@jax.jit
def ms_ssim(a: jax.Array, b: jax.Array, *, data_range: float = 1.0) -> jax.Array:
    """Multi-scale structural similarity of each pair of images: 1 for equal images, between 0 and 1, no unit.

    MS-SSIM = SSIM_M^w_M · Π CS_j^w_j over the scales j < M: CS = (2 σab + C2) / (σa² + σb² + C2), contrast and
    structure, averaged over the image like SSIM, which brings the luminance in at the coarsest scale alone. Each
    scale is the one before it, averaged over 2 x 2 pixels (an odd last row or column is dropped).

    The published five scales need 112 pixels a side (7 at the coarsest). Smaller images have as many scales as
    fit, with the first of the published weights, divided by their sum; below 14 pixels that is one, SSIM itself.
    A negative factor, which has no real power, counts as 0, and passes no gradient.

    The windows are those of `ssim`, uniform 7 x 7, where the paper has Gaussian 11 x 11.

    Args:
      a, b: [N, H, W] or [N, H, W, 1], computed in float32.
      data_range: R, the span of the intensities (1 for images in [0, 1]).

    Returns:
      [N] float32.

    Raises:
      ValueError: the shapes differ, are none of the above, or H or W is below 7.

    Reference: Z. Wang, E. P. Simoncelli, A. C. Bovik, "Multi-scale structural similarity for image quality
    assessment", Asilomar Conference on Signals, Systems and Computers, 2003, equation 7; as in the authors' code,
    the factors are means over the image.
    """
    a, b = _images(a, b, "ms_ssim")
    weights = MS_SSIM_WEIGHTS[: scales(min(a.shape[1:]))]
    product = jnp.ones(len(a))
    for scale, weight in enumerate(weights, 1):
        luminance, structure = similarity_maps(a, b, data_range)
        if scale == len(weights):
            structure = luminance * structure
        product *= power(jnp.mean(structure, axis=(1, 2)), weight / sum(weights))
        a, b = halve(a), halve(b)
    return product


def _images(a: jax.Array, b: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """Both as float32 [N, H, W], or ValueError in the name of the function they were given to."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    if a.shape != b.shape:  # broadcasting would hide a mistake
        raise ValueError(f"expected two arrays of one shape, got {a.shape} and {b.shape}")
    if a.ndim == 4 and a.shape[-1] == 1:
        a, b = a[..., 0], b[..., 0]
    if a.ndim != 3:
        raise ValueError(f"{name} expects images [N, H, W] or [N, H, W, 1], got {a.shape}")
    if min(a.shape[1:]) < SSIM_WINDOW:
        raise ValueError(
            f"{name} needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels (its window), "
            f"got {a.shape[1]} x {a.shape[2]}"
        )
    return a, b


def similarity_maps(a: jax.Array, b: jax.Array, data_range: float) -> tuple[jax.Array, jax.Array]:
    """Luminance, and contrast times structure, of every window: two of [N, H - 6, W - 6]."""
    mean_a, mean_b, var_a, var_b, cov = _window_moments(a, b)
    c1 = (SSIM_K1 * data_range) ** 2
    c2 = (SSIM_K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * cov + c2) / (var_a + var_b + c2)


def scales(side: int) -> int:
    """How many scales fit where the shorter side has so many pixels."""
    fitting = [scale for scale in range(len(MS_SSIM_WEIGHTS)) if side >> scale >= SSIM_WINDOW]
    return len(fitting)


def halve(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels: [N, H, W] -> [N, H // 2, W // 2]."""
    n, height, width = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2).mean(axis=(2, 4))


def power(x: jax.Array, exponent: float) -> jax.Array:
    """max(x, 0)^exponent, with gradient 0 where x is not positive (there, x^exponent's is NaN or infinite)."""
    positive = x > 0
    return jnp.where(positive, jnp.where(positive, x, 1) ** exponent, x * 0)


@jax.custom_vjp
def _window_moments(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
    """Means of a and b, their sample variances and covariance in each window: five of [N, H - 6, W - 6].

    E[x²] - E[x]² cancels in float32 (an error of 1e-7 against C2 = 9e-4). The law of total covariance does
    not, and is separable: the covariance in a window is the mean of its rows' covariances plus the covariance
    of its rows' means.
    """
    mean_a, mean_b, *within = _line_moments(a, b, axis=2)
    within = [_line_mean(moment, axis=1) for moment in within]
    mean_a, mean_b, *between = _line_moments(mean_a, mean_b, axis=1)
    size = SSIM_WINDOW**2
    sample = size / (size - 1)
    return mean_a, mean_b, *(sample * (w + v) for w, v in zip(within, between, strict=True))


def _moments_and_residuals(a: jax.Array, b: jax.Array) -> tuple[tuple, tuple]:
    moments = _window_moments(a, b)
    return moments, (a, b, *moments[:2])


def _gradient_of_moments(residuals: tuple, cotangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The gradient in closed form, since that of the sums over shifts takes many times as long on a CPU.

    A window's covariance moves with a pixel of a by (b - μb) / (n - 1), its variance by 2 (a - μa) / (n - 1), its
    mean by 1 / n; summed over the windows that hold the pixel. The pixel's own value leaves those sums, so each
    is one `_spread` of an image. Values are taken from their image's mean, or large ones would cancel.
    """
    a, b, mean_a, mean_b = residuals
    to_mean_a, to_mean_b, to_var_a, to_var_b, to_cov = cotangents
    centre_a, centre_b = (jnp.mean(x, axis=(1, 2), keepdims=True) for x in (a, b))
    a, mean_a = a - centre_a, mean_a - centre_a
    b, mean_b = b - centre_b, mean_b - centre_b
    size = SSIM_WINDOW**2
    spread_cov = _spread(to_cov)

    constant_a = (size - 1) / size * to_mean_a - 2 * to_var_a * mean_a - to_cov * mean_b
    constant_b = (size - 1) / size * to_mean_b - 2 * to_var_b * mean_b - to_cov * mean_a
    return (
        (2 * _spread(to_var_a) * a + spread_cov * b + _spread(constant_a)) / (size - 1),
        (2 * _spread(to_var_b) * b + spread_cov * a + _spread(constant_b)) / (size - 1),
    )


_window_moments.defvjp(_moments_and_residuals, _gradient_of_moments)


def _spread(x: jax.Array) -> jax.Array:
    """Sum over the windows that hold each pixel: [N, H - 6, W - 6] -> [N, H, W].

    Two products, with matrices of ones where a window holds a pixel. XLA fuses a sum of padded, shifted images with
    all that comes before it, and computes that anew for each shift.
    """

    def windows(runs: int) -> jax.Array:
        behind = np.arange(runs + SSIM_WINDOW - 1) - np.arange(runs)[:, None]
        return jnp.asarray((behind >= 0) & (behind < SSIM_WINDOW), x.dtype)

    rows, columns = windows(x.shape[1]), windows(x.shape[2])
    highest = jax.lax.Precision.HIGHEST
    along_rows = jnp.matmul(x, columns, precision=highest)  # the last axis first: the other order transposes x
    return jnp.matmul(jnp.broadcast_to(rows.T, (len(x), *rows.T.shape)), along_rows, precision=highest)


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


def _shifts(x: jax.Array, axis: int) -> Iterator[jax.Array]:
    """The 7 views that hold the first, second, ... member of every run of 7 along one axis."""
    runs = x.shape[axis] - SSIM_WINDOW + 1
    return (jax.lax.slice_in_dim(x, i, i + runs, axis=axis) for i in range(SSIM_WINDOW))
