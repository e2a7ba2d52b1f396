"""The published project's own evaluation, for the one figure that can be compared with its 0.4776.

Original and reconstruction are z-scored by the original's mean and standard deviation, resized to 256 x 256,
clipped to [0, 1] and compared by SSIM with data_range 1. Clipping makes everything darker than the mean black
and everything brighter than one standard deviation above it white: most of the picture no longer counts.
"""

import numpy as np

from vqvae_jax.data.grid import fit

SIZE = (256, 256)


def z_score(intensities: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(x - mean) / standard deviation, with those of ``like``; 0 where ``like`` is constant. Float32 [H, W]."""
    deviation = float(like.std())
    return ((intensities - like.mean()) / deviation if deviation else np.zeros_like(intensities)).astype(np.float32)


def model_input(intensities: np.ndarray) -> np.ndarray:
    """What the published code gives its model: the z-scored slice [H, W] at 256 x 256, not clipped."""
    return fit(z_score(intensities, intensities), SIZE, "resize")


def to_compare(intensities: np.ndarray, original: np.ndarray) -> np.ndarray:
    """A slice [H, W] in the scanner's intensities as the published code compares it: [256, 256] in [0, 1]."""
    return np.clip(fit(z_score(intensities, original), SIZE, "resize"), 0, 1)
