"""Evaluate a run: its checkpoint and a split in, ``eval/SPLIT/`` out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vqvae_jax.config import Config
from vqvae_jax.data import loader
from vqvae_jax.evaluation import pictures, table
from vqvae_jax.evaluation.evaluator import Evaluator, Pair
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
    """A run's evaluation, and what reconstructs more of its slices."""

    config: Config
    evaluation: Evaluation
    evaluator: Evaluator
    variables: Variables

    def reconstruct(self, indices: Sequence[int]) -> Iterator[Pair]:
        """Some slices with their reconstructions: `Evaluator.reconstruct`."""
        return self.evaluator.reconstruct(self.variables, indices)


def evaluate_run(
    run_dir: Path,
    split: str = "test",
    which: checkpoint.Which = "best",
    *,
    data: str | None = None,
    log: Callable[[str], None] = print,
) -> EvaluatedRun:
    """Evaluates a run's checkpoint on a split of its data set and writes ``eval/SPLIT/`` into the run.

    Args:
      run_dir: a folder that training wrote.
      split: train, validation or test.
      which: the best checkpoint by validation SSIM, or the newest.
      data: other files to evaluate on than those of the run.
      log: is given lines for people.

    Raises:
      CheckpointError, ConfigError, DataError: the run or its data cannot be read.
    """
    config, variables, slices = open_run(run_dir, split, which, data=data, log=log)
    loss = config.loss
    trained = vgg_weights.on_hand(loss.vgg_weights, *loss.perceptual_layers) if loss.perceptual_weight else None
    evaluator = Evaluator(config, slices, trained)
    evaluation = evaluator.run(variables, reference_protocol=True)
    evaluated = EvaluatedRun(config, evaluation, evaluator, variables)
    _write_results(evaluated, run_dir / runs.EVAL / split)
    return evaluated


def open_run(
    run_dir: Path,
    split: str = "test",
    which: checkpoint.Which = "best",
    *,
    data: str | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Config, Variables, loader.Slices]:
    """What an `Evaluator` needs of a run: its configuration, its variables on every device, and the split.

    The arguments and the errors are those of `evaluate_run`.
    """
    config = runs.load_config(run_dir)
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=data))
    variables = replicate(checkpoint.load_variables(run_dir, config, which))
    (slices,) = loader.open_splits(config.data, config.model.image_size, [split], log)
    return config, variables, slices


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


def _write_results(evaluated: EvaluatedRun, folder: Path) -> None:
    """Writes metrics.json, per_slice.csv and the picture, from the first process; all must call it."""
    evaluation = evaluated.evaluation
    if distributed.is_first():
        table.write(evaluation, folder, evaluated.config)
    indices, labels = zip(*chosen_slices(evaluation.order()), strict=True)
    draw(folder / PICTURE, evaluation, evaluated.reconstruct(indices), labels)
