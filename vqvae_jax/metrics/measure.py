"""The metrics of images of many sizes, each on its own grid, by few compiled programs."""

from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.metrics.images import HFEN_REACH, laplacian_of_gaussian
from vqvae_jax.metrics.similarity import MS_SSIM_WEIGHTS, SSIM_WINDOW, halve, power, scales, similarity_maps

BUCKET = 128
"""Sides are filled up to a multiple of this many pixels, so that sizes share programs."""
PIXELS_AT_ONCE = 1 << 17
"""Pixels in one call: four slices of 256 x 128."""
NAMES = ("ssim", "psnr", "mae", "ms_ssim", "hfen")


def measure(images: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """SSIM, PSNR, MAE, MS-SSIM and HFEN of reconstructions in [0, 1] scale.

    The values are those of the functions of these names, but for rounding. Each image is filled up to a bucket's size
    and the filling is left out of every mean, so 24 sizes need a handful of programs.

    Args:
      images: N reconstructions, [H, W] each, of any sizes from 7 x 7.
      originals: their originals, of the same sizes.

    Returns:
      float32 [N] by name, in the order given.
    """
    buckets = defaultdict(list)
    for index, image in enumerate(images):
        buckets[_bucket_of(image.shape)].append(index)
    found = {name: np.empty(len(images), np.float32) for name in NAMES}
    for (height, width), indices in buckets.items():
        at_once = max(1, PIXELS_AT_ONCE // (height * width))
        for start in range(0, len(indices), at_once):
            chosen = indices[start : start + at_once]
            filled = [_filled([x[i] for i in chosen], at_once, (height, width)) for x in (images, originals)]
            sizes = np.full((at_once, 2), SSIM_WINDOW, np.int32)
            sizes[: len(chosen)] = [images[index].shape for index in chosen]
            exponents = np.stack([_exponents(min(size), scales(min(height, width))) for size in sizes.tolist()])
            for name, values in jax.device_get(_measure(*filled, sizes, exponents)).items():
                found[name][chosen] = values[: len(chosen)]
    return found


def _bucket_of(shape: tuple[int, int]) -> tuple[int, int]:
    height, width = (-(-side // BUCKET) * BUCKET for side in shape)
    return height, width


def _exponents(side: int, most: int) -> np.ndarray:
    """float32 [most]: MS-SSIM's exponents for a shorter side of ``side`` pixels; 0 for scales without room."""
    weights = np.array(MS_SSIM_WEIGHTS[: scales(side)])
    return np.pad(weights / weights.sum(), (0, most - weights.size)).astype(np.float32)


def _filled(images: Sequence[np.ndarray], count: int, bucket: tuple[int, int]) -> np.ndarray:
    """float32 [count, H + 14, W + 14]: images mirrored at their borders, as HFEN wants them, then 0."""
    out = np.zeros((count, bucket[0] + 2 * HFEN_REACH, bucket[1] + 2 * HFEN_REACH), np.float32)
    for row, image in enumerate(images):
        mirrored = np.pad(image, HFEN_REACH, mode="symmetric")
        out[row, : mirrored.shape[0], : mirrored.shape[1]] = mirrored
    return out


@jax.jit
def _measure(images: jax.Array, originals: jax.Array, sizes: jax.Array, exponents: jax.Array) -> dict[str, jax.Array]:
    """Metrics of mirrored, filled images [N, H + 14, W + 14] of sizes [N, 2], with exponents [N, scales]."""
    inner = slice(HFEN_REACH, -HFEN_REACH)
    a, b = images[:, inner, inner], originals[:, inner, inner]
    first = b[:, :1, :1]  # taken off, so that an image of one value has a norm of exactly 0
    error, norm = (
        jnp.sqrt(_sum(jnp.square(laplacian_of_gaussian(x)), sizes)) for x in (images - originals, originals - first)
    )
    ssim, ms_ssim = _similarities(a, b, sizes, exponents)
    return {
        "ssim": ssim,
        "psnr": -10 * jnp.log10(_mean(jnp.square(a - b), sizes)),
        "mae": _mean(jnp.abs(a - b), sizes),
        "ms_ssim": ms_ssim,
        "hfen": jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), jnp.nan),
    }


def _similarities(a: jax.Array, b: jax.Array, sizes: jax.Array, exponents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SSIM [N], and MS-SSIM [N]."""
    last = jnp.sum(exponents > 0, axis=1) - 1
    product, ssim = jnp.ones(len(a)), jnp.zeros(len(a))
    for scale in range(exponents.shape[1]):
        luminance, structure = similarity_maps(a, b, 1.0)
        windows = jnp.maximum(sizes - SSIM_WINDOW + 1, 1)
        whole, contrast = _mean(luminance * structure, windows), _mean(structure, windows)
        if scale == 0:
            ssim = whole
        here = jnp.where(scale == last, whole, contrast)
        product *= jnp.where(scale <= last, power(here, exponents[:, scale]), 1)
        a, b, sizes = halve(a), halve(b), sizes // 2
    return ssim, product


def _sum(values: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sum of the first sizes [N, 2] rows and columns of [N, H, W]: [N]."""
    rows, columns = (jnp.arange(side) < size[:, None] for side, size in zip(values.shape[1:], sizes.T, strict=True))
    return jnp.sum(jnp.where(rows[:, :, None] & columns[:, None, :], values, 0), axis=(1, 2))


def _mean(values: jax.Array, sizes: jax.Array) -> jax.Array:
    return _sum(values, sizes) / jnp.prod(sizes, axis=1)
