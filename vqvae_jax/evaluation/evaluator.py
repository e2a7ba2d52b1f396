"""A split in, metrics out: each slice reconstructed, brought back to its own grid, and measured there."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np
import tqdm

from vqvae_jax import metrics
from vqvae_jax.config import Config
from vqvae_jax.data import grid, intensity, loader
from vqvae_jax.data.loader import Sample
from vqvae_jax.evaluation import reference_protocol as reference
from vqvae_jax.evaluation.table import Evaluation, SliceMetrics
from vqvae_jax.models import vgg16
from vqvae_jax.runtime import compilation, distributed
from vqvae_jax.training.state import Variables
from vqvae_jax.training.step import make_eval_step, split_over_devices

Pair = tuple[Sample, np.ndarray]
"""A slice, and its reconstruction [H, W] in [0, 1] on its own grid."""


class Evaluator:
    """Evaluates a model's variables on one split; compiled once, for batches of one shape.

    Several processes share the slices between them, and each gets all results.

    Args:
      config: the run's configuration.
      slices: the split.
      vgg_variables: of a trained VGG16 down to the configured layers; without them, no perceptual distance.
    """

    def __init__(self, config: Config, slices: loader.Slices, vgg_variables: Variables | None = None):
        self._config = config
        self._slices = slices
        devices = jax.local_device_count()
        wanted = -(-min(config.training.batch_size, len(slices)) // jax.process_count())
        self._batch_size = -(-wanted // devices) * devices
        self._step = make_eval_step(config)
        self._perceptual = _perceptual_metric(config.loss.perceptual_layers, vgg_variables)

    def run(self, variables: Variables, *, reference_protocol: bool = False, keep: Collection[int] = ()) -> Evaluation:
        """Metrics of every slice.

        Args:
          variables: the model's, on every device.
          reference_protocol: also the published project's SSIM.
          keep: indices of slices to return with their reconstructions.
        """
        counts = np.zeros(self._config.model.num_embeddings)
        rows: dict[int, SliceMetrics] = {}
        reference_ssim: dict[int, float] = {}
        kept: dict[int, Pair] = {}
        for batch in self._batches():
            images, of_codes = self._reconstruct(variables, batch.images, batch.mask)
            counts += of_codes
            pairs = self._on_own_grids(batch.samples, images)
            if reference_protocol:
                reference_ssim |= self._reference_ssim(variables, pairs)
            for pair in pairs:
                if pair[0].index in keep:
                    kept[pair[0].index] = pair
            rows.update(self._measure(pairs))
        rows, reference_ssim, kept = map(distributed.gathered, (rows, reference_ssim, kept))
        return Evaluation(
            [rows[index] for index in sorted(rows)],
            counts,
            math.prod(self._config.model.latent_size),
            [reference_ssim[index] for index in sorted(reference_ssim)],
            kept,
        )

    def reconstruct(self, variables: Variables, indices: Sequence[int]) -> Iterator[Pair]:
        """Some slices, each with its reconstruction."""
        for start in range(0, len(indices), self._batch_size):
            samples = [self._slices.sample(index) for index in indices[start : start + self._batch_size]]
            prepared = [(sample, self._slices.fitted(sample)) for sample in samples]
            batch = loader.batch_of(prepared, self._batch_size, self._slices.image_shape)
            yield from self._on_own_grids(samples, self._reconstruct(variables, batch.images, batch.mask)[0])

    def _batches(self) -> Iterator[loader.EvalBatch]:
        processes = jax.process_count()
        share = {"process_index": jax.process_index(), "process_count": processes}
        return tqdm.tqdm(
            loader.eval_batches(self._slices, self._batch_size, **share),
            total=-(-len(self._slices) // (self._batch_size * processes)),
            desc="Evaluating",
            unit="batch",
            leave=False,
            disable=distributed.hides_progress(),
        )

    def _reconstruct(self, variables: Variables, images: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The model's images [B, H, W] of images [B, H, W, 1], and the counts [K] of their codes."""
        output = self._step(variables, split_over_devices(images), split_over_devices(mask))
        return np.asarray(output.reconstruction).reshape(images.shape)[..., 0], np.asarray(output.counts)

    def _on_own_grids(self, samples: Sequence[Sample], images: np.ndarray) -> list[Pair]:
        fit = self._config.data.fit
        return [
            (sample, grid.unfit(image, sample.intensities.shape, fit))
            for sample, image in zip(samples, images, strict=False)
        ]

    def _reference_ssim(self, variables: Variables, pairs: Sequence[Pair]) -> dict[int, float]:
        """SSIM of at most one batch of slices by ``reference_protocol``, by index."""
        originals = np.zeros((self._batch_size, *reference.SIZE), np.float32)
        images = np.zeros_like(originals)
        for row, (sample, own) in enumerate(pairs):
            originals[row] = reference.to_compare(sample.intensities, sample.intensities)
            if self._config.model.reference_flatten:
                images[row] = reference.model_input(sample.intensities)
            else:
                images[row] = reference.to_compare(intensity.unscale(own, *sample.range), sample.intensities)
        if self._config.model.reference_flatten:
            # An imported model has never seen [0, 1]: it is given what the published code gives it.
            images = np.clip(self._reconstruct(variables, images[..., None], np.ones(len(images), np.float32))[0], 0, 1)
        found = np.asarray(metrics.ssim(images, originals))
        return {sample.index: float(ssim) for (sample, _), ssim in zip(pairs, found, strict=False)}

    def _measure(self, pairs: list[Pair]) -> Iterator[tuple[int, SliceMetrics]]:
        """Metrics of slices, by index."""
        found = metrics.measure([own for _, own in pairs], [sample.pixels for sample, _ in pairs])
        for row, (sample, own) in enumerate(pairs):
            measured = {name: float(values[row]) for name, values in found.items()}
            measured["perceptual"] = self._perceptual(own, sample.pixels)
            measured["empty"] = bool(np.ptp(sample.pixels) == 0)
            yield sample.index, SliceMetrics(sample.file, sample.case, sample.slice, *own.shape, **measured)


def _perceptual_metric(
    layers: tuple[str, ...], vgg_variables: Variables | None
) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function of reconstruction and original [H, W]; NaN without variables or where VGG16's pools leave nothing."""
    smallest = vgg16.smallest_side(*layers)

    @compilation.jit
    def distance(vgg_variables, image, original):
        features = vgg16.VGG16(layers=layers).apply
        # One slice after another: on large grids the features of a batch would take gigabytes.
        of_both = (features(vgg_variables, x[None, ..., None]) for x in (image, original))
        return metrics.perceptual_distance(*of_both)[0]

    def measure(image: np.ndarray, original: np.ndarray) -> float:
        if vgg_variables is None or min(image.shape) < smallest:
            return math.nan
        return float(distance(vgg_variables, image, original))

    return measure
