"""Pairs of images [3, H, W] that similarities and errors are tested on."""

import numpy as np
from scipy.ndimage import gaussian_filter

SHAPE = (64, 48)


def noise(seed, scale=1.0, shape=(3, *SHAPE)):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def smooth(seed):
    field = gaussian_filter(noise(seed), (0, 8, 8))
    return (field - field.min()) / np.ptp(field)


def body_on_background(seed):
    """Zeros with tiny noise, but for a bright rectangle with a sharp border."""
    image = np.abs(noise(seed, 1e-4))
    image[:, 20:36, 12:30] = 0.7 + noise(seed, 0.05)[:, 20:36, 12:30]
    return image


RAMP = np.broadcast_to(np.linspace(0, 1, SHAPE[1]), (3, *SHAPE))
PAIRS = {
    "unrelated": (noise(0, 0.2) + 0.5, noise(1, 0.2) + 0.5),
    "noisy copy": (smooth(0), smooth(0) + noise(1, 0.03)),
    "smooth": (smooth(0), smooth(1)),
    "almost equal": (smooth(0), smooth(0) + noise(1, 1e-4)),
    "inverted": (smooth(0), 1 - smooth(0)),
    "ramp and its shift": (RAMP, RAMP + 0.01),
    "flat": (np.full((3, *SHAPE), 0.9), np.full((3, *SHAPE), 0.8)),
    "flat and equal": (np.full((3, *SHAPE), 0.9), np.full((3, *SHAPE), 0.9)),
    "nearly constant": (0.9 + noise(0, 1e-3), 0.9 + noise(1, 1e-3)),
    "far outside the range": (100 + noise(0, 0.03), 100 + noise(1, 0.03)),
    "mostly background": (body_on_background(0), body_on_background(1)),
    "background against zero": (body_on_background(0), np.zeros((3, *SHAPE))),
    "zero": (np.zeros((3, *SHAPE)), np.zeros((3, *SHAPE))),
}
