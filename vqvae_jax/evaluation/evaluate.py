"""Evaluate a run: its checkpoint and a data set in, a folder below ``eval/`` out."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vqvae_jax.config import Config
from vqvae_jax.data import hip_mri, loader
from vqvae_jax.data.splits import SPLITS, WHOLE
from vqvae_jax.evaluation import pictures, table
from vqvae_jax.evaluation.evaluator import Evaluator, Pair
from vqvae_jax.evaluation.prior_figures import MeasuresPrior
from vqvae_jax.evaluation.table import Evaluation
from vqvae_jax.models import vgg_weights
from vqvae_jax.runtime import distributed, runs
from vqvae_jax.training import checkpoint
from vqvae_jax.training.state import Variables
from vqvae_jax.training.step import replicate

FIRST_DRAWN = 5
PICTURE = "reconstructions.png"


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """A run's evaluation, the folder with its results, and what reconstructs more of its slices."""

    config: Config
    evaluation: Evaluation
    folder: Path
    evaluator: Evaluator
    variables: Variables

    def reconstruct(self, indices: Sequence[int]) -> Iterator[Pair]:
        """Some slices with their reconstructions: `Evaluator.reconstruct`."""
        return self.evaluator.reconstruct(self.variables, indices)


def evaluate_run(
    run_dir: Path,
    split: str | None = None,
    which: checkpoint.Which = "best",
    *,
    data: str | None = None,
    measure_prior: MeasuresPrior | None = None,
    log: Callable[[str], None] = print,
) -> EvaluatedRun:
    """Evaluates a run's checkpoint and writes ``eval/SPLIT/`` into the run, or ``eval/NAME-OF-DATA/`` for other data.

    Args:
      run_dir: a folder that training wrote.
      split: train, validation or test. By default the test split of the run's own data, and all images of others.
      which: the best checkpoint by validation SSIM, or the newest.
      data: other files to evaluate on than those of the run.
      measure_prior: what looks at the run's prior, where it has one: ``inference.prior_figures.measure``.
      log: is given lines for people.

    Raises:
      CheckpointError, ConfigError, DataError: the run or its data cannot be read.
    """
    config, variables, slices = open_run(run_dir, split, which, data=data, log=log)
    loss = config.loss
    trained = vgg_weights.on_hand(loss.vgg_weights, *loss.perceptual_layers) if loss.perceptual_weight else None
    evaluator = Evaluator(config, slices, trained)
    evaluation = evaluator.run(variables, reference_protocol=True)
    if measure_prior:
        own_test = data is None and split in (None, "test")
        found = measure_prior(run_dir, which, config, variables, slices, with_samples=own_test, log=log)
        evaluation = dataclasses.replace(evaluation, prior=found)
    folder = _results_folder(run_dir, config, split, data)
    evaluated = EvaluatedRun(config, evaluation, folder, evaluator, variables)
    _write_results(evaluated)
    return evaluated


def open_run(
    run_dir: Path,
    split: str | None = None,
    which: checkpoint.Which = "best",
    *,
    data: str | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Config, Variables, loader.Slices]:
    """What an `Evaluator` needs of a run: its configuration, its variables on every device, and the slices.

    The arguments and the errors are those of `evaluate_run`.
    """
    config = runs.load_config(run_dir)
    if data is not None:
        # Of other files, the axis of training's says nothing where the direction is known.
        axis = None if config.data.slice_direction else config.data.slice_axis
        place = data if data == hip_mri.PHANTOM else os.path.abspath(data)
        other = dataclasses.replace(config.data, data=place, slice_axis=axis, case_pattern=None)
        config = dataclasses.replace(config, data=other)
    elif split is None:
        split = "test"
    with distributed.first_alone():
        survey = hip_mri.look(config.data, config.model.image_size, divide=split is not None)
    for line in survey.summary():
        log(line)
    variables = replicate(checkpoint.load_variables(run_dir, config, which))
    (slices,) = loader.open_splits(survey, config.data, config.model.image_size, [split or WHOLE], log)
    return config, variables, slices


def _results_folder(run_dir: Path, config: Config, split: str | None, data: str | None) -> Path:
    """``eval/SPLIT`` for the run's own data; for others, a folder by their name that holds no results of yet others."""
    if data is None:
        return run_dir / runs.EVAL / (split or "test")
    name = hip_mri.name_of(config.data).split(".")[0] or "data"
    if name in (*SPLITS, WHOLE):
        name = f"data-{name}"
    name = f"{name}-{split}" if split else name
    for number in itertools.count(1):
        folder = run_dir / runs.EVAL / (name if number == 1 else f"{name}-{number}")
        if table.data_of(folder) in (None, config.data.data):
            return folder
    raise AssertionError("the numbers do not end")


def chosen_slices(order: Sequence[int]) -> list[tuple[int, str]]:
    """The slices that are drawn, each with its label: the first, the best, the median, the worst.

    ``order`` is that of `Evaluation.order`.
    """
    first = [(index, f"slice {index + 1} of {len(order)}") for index in range(min(FIRST_DRAWN, len(order)))]
    return [*first, (order[-1], "best"), (order[len(order) // 2], "median"), (order[0], "worst")]


def draw(path: Path, evaluation: Evaluation, pairs: Iterable[Pair], labels: Sequence[str]) -> None:
    """Writes a picture of some slices, from the first process: original, reconstruction, difference, SSIM."""
    rows = []
    for (sample, own), label in zip(pairs, labels, strict=True):
        name = f"{label}: {Path(sample.file).name}, slice {sample.slice}"
        rows.append(pictures.Row(sample.pixels, own, name, evaluation.rows[sample.index].ssim))
    if distributed.is_first():
        pictures.draw_reconstructions(path, rows)


def _write_results(evaluated: EvaluatedRun) -> None:
    """Writes metrics.json, per_slice.csv and the picture, from the first process; all must call it."""
    evaluation = evaluated.evaluation
    if distributed.is_first():
        table.write(evaluation, evaluated.folder, evaluated.config)
    indices, labels = zip(*chosen_slices(evaluation.order()), strict=True)
    draw(evaluated.folder / PICTURE, evaluation, evaluated.reconstruct(indices), labels)
