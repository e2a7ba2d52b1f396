"""A split in, a table of per-slice metrics out, each on the slice's own grid."""

import csv
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from vqvae_jax import checkpoint, distributed, metrics, published, report, training, workdir
from vqvae_jax.config import Config
from vqvae_jax.data import hip_mri, loader, nifti
from vqvae_jax.models import vgg16, vgg_weights

FIRST_DRAWN = 5
LEVELS = ("bottom", "top")
"""Names of two levels of codes, the finest first."""


@dataclasses.dataclass(frozen=True)
class SliceMetrics:
    """Metrics of one slice in [0, 1] scale on its own grid of ``height`` x ``width`` pixels.

    NaN: ``hfen`` where the slice is of one value; ``perceptual`` without trained VGG16 weights, or where the slice
    is too small for them.
    """

    file: str
    case: str
    slice: int
    height: int
    width: int
    ssim: float
    psnr: float
    mae: float
    ms_ssim: float
    hfen: float
    perceptual: float = math.nan


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Per-slice rows in the split's order, and how often each code was used (counts [levels, K]).

    ``counts`` and ``codes_per_slice`` are by level, the finest first. ``published`` has each slice's SSIM by the
    published project's protocol, or is empty if not asked for.
    """

    rows: list[SliceMetrics]
    counts: np.ndarray
    codes_per_slice: tuple[int, ...]
    published: list[float] = dataclasses.field(default_factory=list)

    def mean(self, name: str) -> float:
        """Mean of a metric over the slices."""
        return float(np.mean([getattr(row, name) for row in self.rows]))

    def mean_of_measured(self, name: str) -> float:
        """Mean of a metric over the slices that have it; NaN if none has."""
        values = [getattr(row, name) for row in self.rows]
        measured = [value for value in values if not math.isnan(value)]
        return float(np.mean(measured)) if measured else math.nan

    def order(self) -> list[int]:
        """Indices of the slices from the lowest SSIM to the highest."""
        return sorted(range(len(self.rows)), key=lambda index: self.rows[index].ssim)

    def summary(self) -> dict[str, float]:
        """Every scalar by name.

        ``bits_per_pixel`` spends log2 K bits a code, over the slices' own pixels; ``bits_per_pixel_entropy`` the
        entropy of the codes' frequencies in this split, which an ideal entropy coder that knows them would need.
        Of two levels, both add up their codes' bits, and ``perplexity`` and ``codebook_usage`` are the means of the
        levels', which are there too, as ``perplexity_bottom``, ``perplexity_top`` and so on.
        ``perceptual`` is left out where no slice has it.
        """
        order = self.order()
        pixels = sum(row.height * row.width for row in self.rows)
        codes = np.array(self.codes_per_slice) * len(self.rows)
        perceptual = self.mean_of_measured("perceptual")
        published = {"ssim_published_protocol": float(np.mean(self.published))} if self.published else {}
        return {
            "slices": len(self.rows),
            "ssim": self.mean("ssim"),
            "ssim_highest": self.rows[order[-1]].ssim,
            "ssim_lowest": self.rows[order[0]].ssim,
            "psnr": self.mean("psnr"),
            "mae": self.mean("mae"),
            "ms_ssim": self.mean("ms_ssim"),
            "hfen": self.mean_of_measured("hfen"),
            **({} if math.isnan(perceptual) else {"perceptual": perceptual}),
            **self._of_levels("perplexity", metrics.perplexity(self.counts)),
            **self._of_levels("codebook_usage", metrics.codebook_usage(self.counts)),
            "bits_per_pixel": float(codes.sum() * math.log2(self.counts.shape[-1]) / pixels),
            "bits_per_pixel_entropy": float(codes @ np.asarray(metrics.code_entropy(self.counts))) / pixels,
            **published,
        }

    def _of_levels(self, name: str, values: Any) -> dict[str, float]:
        """The mean of a value over the levels, and where there are two, each one's."""
        levels = dict(zip(LEVELS, map(float, values), strict=False)) if len(values) > 1 else {}
        return {name: float(np.mean(values))} | {f"{name}_{level}": value for level, value in levels.items()}

    def code_use(self, of_codes: str = "") -> str:
        """Perplexity, and the share of codes in use, of each level, for people."""
        perplexity = " / ".join(f"{value:.1f}" for value in metrics.perplexity(self.counts))
        usage = " / ".join(f"{value:.1%}" for value in metrics.codebook_usage(self.counts))
        which = f" ({' / '.join(LEVELS)})" if len(self.counts) > 1 else ""
        return f"Perplexity: {perplexity}{which}{of_codes}, codes used: {usage}"


class Evaluator:
    """Evaluates parameters on one split; compiled once, for batches of one shape.

    Several processes share the slices between them, and each gets all results.

    Args:
      config: the run's configuration.
      slices: the split.
      vgg_params: trained VGG16's variables down to the configured layers; without them, no perceptual distance.
    """

    def __init__(self, config: Config, slices: loader.Slices, vgg_params: Any = None):
        self._config = config
        self._slices = slices
        devices = jax.local_device_count()
        wanted = -(-min(config.training.batch_size, len(slices)) // jax.process_count())
        self._batch_size = -(-wanted // devices) * devices
        self._step = training.make_eval_step(config)
        self._perceptual = _perceptual_metric(config.loss.perceptual_layers, vgg_params)

    def run(self, variables: Any, *, published_protocol: bool = False) -> Evaluation:
        """Metrics of every slice; with ``published_protocol`` also the published project's SSIM."""
        published_ssim: dict[int, float] = {}
        counts = np.zeros((self._config.model.levels, self._config.model.num_codes))
        rows: dict[int, SliceMetrics] = {}
        waiting: dict[tuple[int, int], list] = defaultdict(list)
        share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = loader.eval_batches(self._slices, self._batch_size, **share)
        bar = {"total": -(-len(self._slices) // (self._batch_size * jax.process_count())), "unit": "batch"}
        bar |= {"leave": False, "disable": distributed.hides_progress()}
        for batch in tqdm.tqdm(batches, desc="Evaluating", **bar):
            images, output = self._reconstruct(variables, batch.images, batch.mask)
            counts += np.asarray(output.counts, np.float64)
            if published_protocol:
                published_ssim |= self._published_ssim(variables, batch, images)
            for index, image in zip(batch.indices[batch.mask > 0], images, strict=False):
                sample, own = self._on_own_grid(int(index), image)
                same_shape = waiting[own.shape]
                same_shape.append((int(index), sample, own))
                if len(same_shape) == self._batch_size:
                    rows.update(self._measure(same_shape))
                    same_shape.clear()
        for same_shape in waiting.values():
            if same_shape:
                rows.update(self._measure(same_shape))
        codes = tuple(map(math.prod, self._config.model.latent_sizes))
        rows, published_ssim = distributed.gathered(rows), distributed.gathered(published_ssim)
        in_order = [[results[index] for index in sorted(results)] for results in (rows, published_ssim)]
        return Evaluation(in_order[0], counts, codes, in_order[1])

    def draw(
        self,
        variables: Any,
        evaluation: Evaluation,
        indices: Sequence[int],
        labels: Sequence[str],
        path: Path,
    ) -> None:
        """Writes a picture of some slices: original, reconstruction, difference, with their SSIM."""
        drawn = []
        for name, index, (sample, own) in zip(labels, indices, self.reconstruct(variables, indices), strict=True):
            label = f"{name}: {Path(sample.file).name}, slice {sample.slice}"
            drawn.append(report.Row(sample.pixels, own, label, evaluation.rows[index].ssim))
        if distributed.is_first():
            report.draw_reconstructions(path, drawn)

    def reconstruct(self, variables: Any, indices: Sequence[int]) -> Iterator[tuple[loader.Sample, np.ndarray]]:
        """Some slices, each with its reconstruction: float32 [H, W] in [0, 1] on the slice's own grid."""
        for start in range(0, len(indices), self._batch_size):
            chosen = indices[start : start + self._batch_size]
            images = np.zeros((self._batch_size, *self._slices.image_shape), np.float32)
            images[: len(chosen)] = [self._slices[index] for index in chosen]
            reconstructed, _ = self._reconstruct(variables, images, np.ones(self._batch_size, np.float32))
            for index, image in zip(chosen, reconstructed, strict=False):
                yield self._on_own_grid(index, image)

    def _reconstruct(self, variables: Any, images: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, Any]:
        split = training.split_over_devices
        output = self._step(variables, split(images), split(mask))
        return np.asarray(output.reconstruction).reshape(images.shape)[..., 0], output

    def _published_ssim(self, variables: Any, batch: loader.EvalBatch, images: np.ndarray) -> dict[int, float]:
        """SSIM, by index, by ``published``'s protocol of the batch's slices, whose reconstructions are ``images``."""
        indices = [int(index) for index in batch.indices[batch.mask > 0]]
        intensities = [self._slices.intensities(index) for index in indices]
        originals = np.zeros((self._batch_size, *published.SIZE), np.float32)
        originals[: len(indices)] = [published.to_compare(raw, raw) for raw in intensities]
        compared = np.zeros_like(originals)
        if self._config.model.published_flatten:
            # An imported model has never seen [0, 1]: it is given what the published code gives it.
            compared[: len(indices)] = [published.model_input(raw) for raw in intensities]
            mask = np.ones(self._batch_size, np.float32)
            compared = np.clip(self._reconstruct(variables, compared[..., None], mask)[0], 0, 1)
        else:
            for row, (index, raw) in enumerate(zip(indices, intensities, strict=True)):
                sample, own = self._on_own_grid(index, images[row])
                compared[row] = published.to_compare(nifti.unscale(own, *sample.range), raw)
        return dict(zip(indices, map(float, np.asarray(metrics.ssim(compared, originals))), strict=False))

    def _on_own_grid(self, index: int, image: np.ndarray) -> tuple[loader.Sample, np.ndarray]:
        sample = self._slices.sample(index)
        return sample, nifti.unfit(image, sample.pixels.shape, self._config.data.fit)

    def _measure(self, samples: list[tuple[int, loader.Sample, np.ndarray]]) -> Iterator[tuple[int, SliceMetrics]]:
        """Metrics of slices of one shape, at one compiled batch size."""
        filled = [*samples, *[samples[0]] * (self._batch_size - len(samples))]
        originals = np.stack([sample.pixels for _, sample, _ in filled])
        images = np.stack([own for _, _, own in filled])
        measures = (metrics.ssim, metrics.psnr, metrics.mae, metrics.ms_ssim, metrics.hfen)
        found = jax.device_get([measure(images, originals) for measure in measures])
        for row, (index, sample, own) in enumerate(samples):
            yield (
                index,
                SliceMetrics(
                    sample.file,
                    sample.case,
                    sample.slice,
                    *own.shape,
                    *(float(values[row]) for values in found),
                    perceptual=self._perceptual(own, sample.pixels),
                ),
            )


def _perceptual_metric(layers: tuple[str, ...], vgg_params: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function of reconstruction and original [H, W]; NaN without parameters or where VGG16's pools leave nothing."""
    smallest = vgg16.smallest_side(*layers)

    @jax.jit
    def distance(vgg_params, image, original):
        features = vgg16.VGG16(layers=layers).apply
        # One slice after another: on large grids the features of a batch would take gigabytes.
        return metrics.perceptual_distance(*(features(vgg_params, x[None, ..., None]) for x in (image, original)))[0]

    def measure(image: np.ndarray, original: np.ndarray) -> float:
        if vgg_params is None or min(image.shape) < smallest:
            return math.nan
        return float(distance(vgg_params, image, original))

    return measure


def evaluate_run(
    run: Path,
    split: str = "test",
    which: checkpoint.Which = "best",
    *,
    data: str | None = None,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluates a run's checkpoint on a split of its data set and writes ``eval/SPLIT/`` into the run.

    Args:
      run: a folder that training wrote.
      split: train, validation or test.
      which: the best checkpoint by validation SSIM, or the newest.
      data: other files to evaluate on than those of the run.
      log: is given lines for people.

    Raises:
      CheckpointError, ConfigError, DataError: the run or its data cannot be read.
    """
    return evaluate(run, split, which, data=data, log=log).evaluation


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """A run's evaluation, and what draws more of it."""

    config: Config
    evaluation: Evaluation
    evaluator: Evaluator
    variables: Any

    def reconstruct(self, indices: Sequence[int]) -> Iterator[tuple[loader.Sample, np.ndarray]]:
        """Some slices with their reconstructions: `Evaluator.reconstruct`."""
        return self.evaluator.reconstruct(self.variables, indices)


def evaluate(
    run: Path,
    split: str = "test",
    which: checkpoint.Which = "best",
    *,
    data: str | None = None,
    log: Callable[[str], None] = print,
) -> EvaluatedRun:
    """`evaluate_run`, for who goes on with its pictures."""
    config, variables, slices = open_run(run, split, which, data=data, log=log)
    loss = config.loss
    trained = vgg_weights.on_hand(loss.vgg_weights, *loss.perceptual_layers) if loss.perceptual_weight else None
    evaluator = Evaluator(config, slices, trained)
    evaluation = evaluator.run(variables, published_protocol=True)
    write_results(evaluation, evaluator, variables, run / workdir.EVAL / split, scaling(config))
    return EvaluatedRun(config, evaluation, evaluator, variables)


def open_run(
    run: Path,
    split: str = "test",
    which: checkpoint.Which = "best",
    *,
    data: str | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Config, Any, loader.Slices]:
    """What an `Evaluator` needs of a run: its configuration, its variables on every device, and the split.

    The arguments and the errors are those of `evaluate_run`.
    """
    config = workdir.load_config(run)
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    variables = training.replicate(checkpoint.restore_evaluated(run, config, which))
    with distributed.first_alone():
        builder = hip_mri.prepare(config.data, config.model.image_size, log)
    slices = loader.Slices(builder.as_data_source(split=split), config.data, config.model.image_size)
    return config, variables, slices


def scaling(config: Config) -> str:
    """How the figures were measured, for people."""
    low, high = config.data.scale_percentiles
    return (
        "SSIM by scikit-image's definition (7x7 uniform window, data_range 1), MS-SSIM with the same window, "
        "PSNR, MAE and HFEN: each slice on its own "
        f"grid, in [0, 1] between percentiles {low:g} and {high:g} of its file"
    )


def write_results(evaluation: Evaluation, evaluator: Evaluator, variables: Any, folder: Path, protocol: str) -> None:
    """Writes metrics.json, per_slice.csv and reconstructions.png, from the first process; all must call it."""
    if distributed.is_first():
        _write_tables(evaluation, folder, protocol)
    order = evaluation.order()
    first = range(min(FIRST_DRAWN, len(order)))
    chosen = [*first, order[-1], order[len(order) // 2], order[0]]
    labels = [*(f"slice {index + 1} of {len(order)}" for index in first), "best", "median", "worst"]
    evaluator.draw(variables, evaluation, chosen, labels, folder / "reconstructions.png")


def _write_tables(evaluation: Evaluation, folder: Path, protocol: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    summary = {name: value if math.isfinite(value) else None for name, value in evaluation.summary().items()}
    workdir.write_atomically(folder / "metrics.json", json.dumps(summary | {"protocol": protocol}, indent=2) + "\n")
    with (folder / "per_slice.csv").open("w", newline="") as file:
        rows = [dataclasses.asdict(row) for row in evaluation.rows]
        for row, ssim in zip(rows, evaluation.published, strict=False):
            row["ssim_published_protocol"] = ssim
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def describe(evaluation: Evaluation, protocol: str) -> Iterator[str]:
    """Lines for people."""
    summary = evaluation.summary()
    yield f"Average SSIM: {summary['ssim']:.4f}"
    yield f"Highest SSIM: {summary['ssim_highest']:.4f}, lowest SSIM: {summary['ssim_lowest']:.4f}"
    yield f"MS-SSIM: {summary['ms_ssim']:.4f}, PSNR: {summary['psnr']:.2f} dB, MAE: {summary['mae']:.4f}"
    perceptual = f", perceptual distance: {summary['perceptual']:.4f}" if "perceptual" in summary else ""
    yield f"High-frequency error norm: {summary['hfen']:.4f}{perceptual}"
    yield (
        f"{evaluation.code_use(f' of {evaluation.counts.shape[-1]} codes')}, "
        f"bits per pixel: {summary['bits_per_pixel']:.4f}, "
        f"by the codes' entropy: {summary['bits_per_pixel_entropy']:.4f}"
    )
    yield f"{summary['slices']} slices. {protocol}."
    if "ssim_published_protocol" in summary:
        yield (
            f"SSIM by the published project's protocol: {summary['ssim_published_protocol']:.4f} (z-scored, clipped to "
            "[0, 1], 256 x 256; a poor measure, to compare with its 0.4776 alone)"
        )
