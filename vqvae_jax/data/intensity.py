"""Bring a file's intensities to [0, 1], and back."""

import numpy as np


def intensity_range(voxels: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """The intensities that become 0 and 1: two percentiles, or the extremes where those coincide in float32."""
    low, high = np.percentile(voxels, percentiles).astype(np.float32)
    if high <= low:
        low, high = voxels.min(), voxels.max()
    return float(low), float(high)


def scale(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Intensities to [0, 1], clipped: (x - low) / (high - low), float32. A constant image becomes 0."""
    if high <= low:
        return np.zeros_like(pixels, dtype=np.float32)
    return np.clip((pixels - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)


def unscale(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Inverse of ``scale`` (but for what it clipped): [0, 1] to intensities, float32."""
    return (pixels * np.float32(high - low) + np.float32(low)).astype(np.float32)
