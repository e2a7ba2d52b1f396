"""Evaluate a run: python scripts/eval.py [--workdir runs/NAME] [--split test]."""

import dataclasses
from pathlib import Path
from typing import Literal

import _command
import tyro

from vqvae_jax import evaluation, workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Evaluates a run's checkpoint on one split of its data set, and writes the results into the run."""

    workdir: Path | None = None
    """The run's folder; the newest in runs/ by default."""
    split: Literal["train", "validation", "test"] = "test"
    """Which slices."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best checkpoint by validation SSIM, or the newest."""
    data: str | None = None
    """Other files than those the run was trained on: a zip, a folder, or "phantom"."""
    platform: _command.Platform = "auto"
    """What to compute on."""


def main() -> int:
    """Parses the flags, evaluates, prints."""
    flags = tyro.cli(Flags)
    _command.use_platform(flags.platform)
    run = flags.workdir or workdir.newest()
    print(f"Run: {run}, split {flags.split}, {flags.checkpoint} checkpoint")
    result = evaluation.evaluate_run(run, flags.split, flags.checkpoint, data=flags.data)
    for line in evaluation.describe(result, evaluation.scaling(workdir.load_config(run))):
        print(line)
    print(f"Written: {run / workdir.EVAL / flags.split}/ (metrics.json, per_slice.csv, reconstructions.png)")
    return 0


if __name__ == "__main__":
    _command.run(main)
