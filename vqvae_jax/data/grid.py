"""Bring slices to a model's grid of pixels, and back."""

import numpy as np


def fit(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Brings a slice [H, W] in [0, 1] to ``size``.

    ``pad-crop`` keeps the pixels: each axis is centred, padded with 0 or cut. ``resize`` keeps the field
    of view: bilinear, with a Gaussian against aliasing where it shrinks.
    """
    if pixels.shape == tuple(size):
        return pixels
    if mode == "resize":
        return _resize(pixels, size)
    fitted = np.zeros(size, dtype=np.float32)
    inside, outside = _centred(pixels.shape, size)
    fitted[outside] = pixels[inside]
    return fitted


def unfit(pixels: np.ndarray, shape: tuple[int, int], mode: str) -> np.ndarray:
    """Inverse of ``fit``: a model's image back on the slice's own grid of ``shape``.

    What ``pad-crop`` cut away comes back as 0: the model never saw it.
    """
    return fit(pixels, shape, mode)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from skimage.transform import resize  # noqa: PLC0415  (half a second to import, seldom needed)

    shrinks = size[0] < pixels.shape[0] or size[1] < pixels.shape[1]
    return resize(pixels, size, order=1, mode="edge", anti_aliasing=shrinks, preserve_range=True).astype(np.float32)


def _centred(shape: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Index tuples that pick the same centred window from an array of ``shape`` and one of ``size``."""
    inside, outside = [], []
    for have, want in zip(shape, size, strict=True):
        common = min(have, want)
        # Half a pixel off where the difference is odd; the same formula both ways makes unfit exact.
        inside.append(slice((have - common) // 2, (have - common) // 2 + common))
        outside.append(slice((want - common) // 2, (want - common) // 2 + common))
    return tuple(inside), tuple(outside)
