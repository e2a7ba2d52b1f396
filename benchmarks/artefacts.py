"""Does the prior see artefacts? Area under the ROC curve of bits a slice, beside that of the reconstruction error.

    python benchmarks/artefacts.py --workdir runs/NAME [--split test] [--slices 100] [--strength 1]

Each slice of a split is scored as it is, and with a synthetic artefact. The area is the chance that an altered slice
has a higher score than a clean one: 0.5 tells nothing, 1 everything, and below 0.5 altered slices look more likely.
Bits are of the slice alone. The error is the mean absolute difference to the reconstruction.
"""

import argparse
from pathlib import Path

import numpy as np
from _measure import print_table, run
from scipy import ndimage

import vqvae_jax
from vqvae_jax import metrics
from vqvae_jax.data import hip_mri, loader
from vqvae_jax.inference.trained_model import TrainedModel
from vqvae_jax.runtime import compilation, runs


def spike(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A spike in k-space: stripes over the whole image [H, W], of 0.1 in [0, 1]."""
    rows, columns = (np.arange(side) / side for side in image.shape)
    wave = 2 * np.pi * (rng.integers(5, 20) * rows[:, None] + rng.integers(5, 20) * columns)
    return image + 0.1 * strength * np.cos(wave + rng.uniform(0, 2 * np.pi))


def ghost(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A ghost of motion: the image again, by half its height away, with a fifth of its intensity."""
    del rng
    return image + 0.2 * strength * np.roll(image, image.shape[0] // 2, axis=0)


def blur(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A Gaussian of 1 pixel."""
    del rng
    return ndimage.gaussian_filter(image, strength)


def disc(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A bright disc in the middle half of the image, a sixteenth of its shorter side in radius."""
    height, width = image.shape
    top, left = rng.uniform(height / 4, 3 * height / 4), rng.uniform(width / 4, 3 * width / 4)
    rows, columns = np.ogrid[:height, :width]
    inside = np.hypot(rows - top, columns - left) < min(height, width) / 16
    return np.where(inside, np.maximum(image, 0.9 * strength), image)


ARTEFACTS = (spike, ghost, blur, disc)


def scores(model: TrainedModel, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits a code and the reconstruction's mean absolute error of each of images [N, H, W] in [0, 1]."""
    bits = model.bits(images, progress=True).mean(axis=(1, 2))
    rebuilt = model.reconstruct(images, progress=True)
    return bits, np.abs(rebuilt - images).mean(axis=(1, 2))


def main() -> None:
    """Parses the flags, alters the slices, prints the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--workdir", type=Path, required=True)
    flags.add_argument("--split", default="test")
    flags.add_argument("--slices", type=int, default=100, help="slices, spread over the split")
    flags.add_argument("--strength", type=float, default=1.0, help="of the artefacts")
    flags = flags.parse_args()
    compilation.use_cache()
    config, model = runs.load_config(flags.workdir), vqvae_jax.load(flags.workdir)
    survey = hip_mri.look(config.data, config.model.image_size)
    (slices,) = loader.open_splits(survey, config.data, config.model.image_size, [flags.split])
    chosen = np.unique(np.linspace(0, len(slices) - 1, min(flags.slices, len(slices))).astype(int))
    clean = np.stack([slices[int(place)][..., 0] for place in chosen])
    of_clean, rng, rows = scores(model, clean), np.random.default_rng(0), []
    for artefact in ARTEFACTS:
        altered = np.stack([np.clip(artefact(image, rng, flags.strength), 0, 1) for image in clean])
        areas = map(metrics.roc_area, of_clean, scores(model, altered.astype(np.float32)))
        rows.append((artefact.__name__, *(f"{area:.3f}" for area in areas)))
    print_table((f"artefact, {len(clean)} slices", "ROC area, bits", "ROC area, error"), rows)


if __name__ == "__main__":
    run(main)
