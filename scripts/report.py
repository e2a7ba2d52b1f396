"""Write a run's report: python scripts/report.py [--workdir runs/NAME] [--split test] [--slices 60]."""

import dataclasses
from pathlib import Path
from typing import Literal

import _command
import tyro

from vqvae_jax.errors import ConfigError
from vqvae_jax.evaluation import SHOWN
from vqvae_jax.runtime import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Evaluates a run as scripts/eval.py does, and writes one HTML page to look at and to send on."""

    workdir: Path | None = None
    """The run's folder; the newest in runs/ by default."""
    split: Literal["train", "validation", "test"] | None = None
    """Which slices; by default the test split, and with --data all images."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best checkpoint by validation SSIM, or the newest."""
    data: str | None = None
    """Other files than those the run was trained on: a zip, a folder, or "phantom"."""
    slices: int = SHOWN
    """The most slices to show: the worst, the best, and evenly spaced ones between."""
    platform: _command.Platform = "auto"
    """What to compute on."""


def main() -> int:
    """Parses the flags, evaluates, writes the page."""
    flags = tyro.cli(Flags)
    if flags.slices < 1:
        raise ConfigError(f"--slices {flags.slices}: must be at least 1")
    from vqvae_jax.evaluation import html_report  # noqa: PLC0415 - after the flags: --help needs no JAX
    from vqvae_jax.evaluation.evaluate import evaluate_run  # noqa: PLC0415
    from vqvae_jax.inference import prior_figures  # noqa: PLC0415

    _command.use_platform(flags.platform)
    run_dir = flags.workdir or runs.newest()
    print(f"Run: {run_dir}, {flags.checkpoint} checkpoint")
    evaluated = evaluate_run(
        run_dir, flags.split, flags.checkpoint, data=flags.data, measure_prior=prior_figures.measure
    )
    path = html_report.write(run_dir, flags.split, flags.checkpoint, evaluated, flags.slices)
    print(f"Average SSIM: {evaluated.evaluation.mean('ssim'):.4f}")
    print(f"Report: {path} (open it in a browser; it needs no other file and no network)")
    return 0


if __name__ == "__main__":
    _command.run(main)
