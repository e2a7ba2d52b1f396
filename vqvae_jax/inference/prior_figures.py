"""Measures a run's prior on a split: bits of its codes, and samples beside real slices."""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from vqvae_jax import metrics
from vqvae_jax.coding import prior_coder
from vqvae_jax.config import Config
from vqvae_jax.data.loader import Slices
from vqvae_jax.evaluation import evaluate
from vqvae_jax.evaluation.prior_figures import PriorFigures, SampleFigures
from vqvae_jax.inference import samples
from vqvae_jax.inference.trained_model import TrainedModel, load
from vqvae_jax.models import vgg16, vgg_weights
from vqvae_jax.runtime import compilation
from vqvae_jax.training.prior_data import CodeSource
from vqvae_jax.training.state import Variables

COUNT = 256
"""Samples that are drawn to be measured."""
SHOWN = 16
NEAR = 0.05
"""The share of rebuilt test slices that count as near to a training slice."""
_MOST_REAL = 1024
"""Real slices that are compared in features and in pairs, spread over their split."""
_AT_ONCE = 16


def measure(
    run_dir: Path,
    which: str,
    config: Config,
    variables: Variables,
    slices: Slices,
    *,
    with_samples: bool,
    log: Callable[[str], None],
) -> PriorFigures | None:
    """Figures of a run's prior on a split; None where there is no prior. As `evaluate.evaluate_run` calls it.

    Bits are those that encode.py spends: the slices of a volume are given those before. Samples are drawn with seed 0,
    and compared on the model's grid.

    Raises:
      CheckpointError, ConfigError, DataError: the prior or the training slices cannot be read.
    """
    model = load(run_dir, which)
    if model.prior_doubt:
        log(f"Warning: {model.prior_doubt}")
    if model.prior is None:
        return None
    source = CodeSource(config, variables, slices, 1, 0)
    codes = source.plain().indices
    bits = np.empty(codes.shape)
    volumes = list(source.volumes())
    for places in tqdm.tqdm(volumes, desc="Bits by the prior", unit="volume", leave=False, disable=None):
        bits[places] = prior_coder.bits(codes[places], model.prior)
    if not with_samples:
        return PriorFigures(bits)
    _, _, training = evaluate.open_run(run_dir, "train", which, log=lambda line: None)
    return PriorFigures(bits, _of_samples(model, slices, training))


def nearest(images: np.ndarray, slices: Slices) -> tuple[np.ndarray, np.ndarray]:
    """The place in a split of the slice nearest to each image [N, H, W], and their root mean squared difference.

    int [N] and float64 [N].
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    least, places = np.full(len(flat), np.inf), np.zeros(len(flat), int)
    for start in range(0, len(slices), COUNT):
        chosen = range(start, min(start + COUNT, len(slices)))
        real = np.stack([slices[place].ravel() for place in chosen]).astype(np.float64)
        squares = (flat**2).sum(1)[:, None] - 2 * flat @ real.T + (real**2).sum(1)
        found = squares.argmin(axis=1)
        better = squares[np.arange(len(flat)), found] < least
        places[better] = start + found[better]
        least[better] = squares[np.arange(len(flat)), found][better]
    return places, np.sqrt(np.maximum(least, 0) / flat.shape[1])


def features(images: np.ndarray, config: Config) -> np.ndarray | None:
    """The perceptual network's features of images [N, H, W], averaged over pixels: [N, D]; None without weights."""
    layers = config.loss.perceptual_layers
    variables = vgg_weights.on_hand(config.loss.vgg_weights, *layers)
    if variables is None or min(images.shape[1:]) < vgg16.smallest_side(*layers):
        return None

    @compilation.jit
    def averaged(variables, images):
        found = vgg16.VGG16(layers=layers).apply(variables, images[..., None])
        return jnp.concatenate([jnp.mean(found[layer], axis=(1, 2)) for layer in layers], axis=-1)

    return _in_batches(lambda batch: averaged(variables, batch), images)


def _of_samples(model: TrainedModel, test: Slices, training: Slices) -> SampleFigures:
    drawn = samples.sample(model, COUNT, progress=True)
    real, of_training = (_spread(slices) for slices in (test, training))
    rebuilt = model.reconstruct(_spread(test), intensity_range=(0, 1))
    places, distances = nearest(drawn, training)
    threshold = np.quantile(nearest(rebuilt, training)[1], NEAR)
    of_drawn, of_real, of_trained = (features(images, model.config) for images in (drawn, real, of_training))
    known = of_drawn is not None and min(len(real), len(of_training)) > 1
    shown = [np.concatenate([drawn[row], training[places[row]][..., 0]], axis=1) for row in range(SHOWN)]
    return SampleFigures(
        count=COUNT,
        kernel_distance=metrics.kernel_distance(of_drawn, of_real) if known else math.nan,
        kernel_distance_real=metrics.kernel_distance(of_trained, of_real) if known else math.nan,
        ms_ssim=_alikeness(drawn),
        ms_ssim_real=_alikeness(real),
        near_training=float(np.mean(distances < threshold)),
        pairs=np.stack(shown),
    )


def _spread(slices: Slices) -> np.ndarray:
    """At most _MOST_REAL slices [N, H, W] of a split."""
    places = np.unique(np.linspace(0, len(slices) - 1, min(len(slices), _MOST_REAL)).astype(int))
    return np.stack([slices[int(place)][..., 0] for place in places])


def _alikeness(images: np.ndarray) -> float:
    """Mean MS-SSIM of images [N, H, W] and others of them by chance."""
    others = np.roll(np.random.default_rng(0).permutation(len(images)), 1)
    order = np.roll(others, -1)
    both = np.stack([images[order], images[others]], axis=1)
    return float(_in_batches(lambda batch: metrics.ms_ssim(batch[:, 0], batch[:, 1]), both).mean())


def _in_batches(function: Callable[[np.ndarray], jax.Array], images: np.ndarray) -> np.ndarray:
    """A function of some images, of all of them; the last batch is filled up, so that one program serves all."""
    found = []
    for start in range(0, len(images), _AT_ONCE):
        batch = images[start : start + _AT_ONCE]
        found.append(np.asarray(function(np.resize(batch, (_AT_ONCE, *batch.shape[1:]))))[: len(batch)])
    return np.concatenate(found)
