"""Evaluate a run: python scripts/eval.py [--workdir runs/NAME] [--split test]."""

import dataclasses
from pathlib import Path
from typing import Literal

import _command
import tyro

from vqvae_jax.runtime import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Evaluates a run's checkpoint on one split of its data set, and writes the results into the run."""

    workdir: Path | None = None
    """The run's folder; the newest in runs/ by default."""
    split: Literal["train", "validation", "test"] | None = None
    """Which slices; by default the test split, and with --data all images."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best checkpoint by validation SSIM, or the newest."""
    data: str | None = None
    """Other files than those the run was trained on: a zip, a folder, or "phantom"."""
    report: bool = False
    """Also write report.html, a page to look at and to send on."""
    platform: _command.Platform = "auto"
    """What to compute on."""


def main() -> int:
    """Parses the flags, evaluates, prints."""
    flags = tyro.cli(Flags)
    from vqvae_jax.evaluation import html_report, table  # noqa: PLC0415 - after the flags: --help needs no JAX
    from vqvae_jax.evaluation.evaluate import evaluate_run  # noqa: PLC0415
    from vqvae_jax.inference import prior_figures  # noqa: PLC0415

    _command.use_platform(flags.platform)
    run_dir = flags.workdir or runs.newest()
    print(f"Run: {run_dir}, {flags.checkpoint} checkpoint")
    evaluated = evaluate_run(
        run_dir, flags.split, flags.checkpoint, data=flags.data, measure_prior=prior_figures.measure
    )
    for line in table.describe(evaluated.evaluation, evaluated.config):
        print(line)
    print(f"Written: {evaluated.folder}/ (metrics.json, per_slice.csv, reconstructions.png)")
    if flags.report:
        print(f"Report: {html_report.write(run_dir, flags.split, flags.checkpoint, evaluated)}")
    else:
        print("A page to look at: add --report")
    return 0


if __name__ == "__main__":
    _command.run(main)
