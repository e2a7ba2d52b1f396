"""New slices from a run's prior: python scripts/sample.py --out DIR [--count 64] [--workdir runs/NAME]."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import _command
import tyro

import vqvae_jax
from vqvae_jax.errors import ConfigError
from vqvae_jax.runtime import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Draws new slices or a new volume, or fills in a region of a slice. Writes NIfTI files, and a picture of all."""

    out: Path
    """The folder to write to."""
    workdir: Path | None = None
    """The run's folder; the newest in runs/ by default. It needs a prior (scripts/train_prior.py)."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best checkpoint by validation SSIM, or the newest."""
    count: int = 64
    """How many slices."""
    volume: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Instead, one volume of N slices, each drawn given those before."""
    like: Path | None = None
    """Instead, this NIfTI slice --count times, with what --keep-mask leaves out made anew."""
    keep_mask: Path | None = None
    """With --like: a NIfTI file of its shape, not 0 where it is kept."""
    steps: int = 12
    """Parts that the codes of a slice are drawn in."""
    temperature: float = 1.0
    """Below 1, likely codes become likelier."""
    seed: int = 0
    """The one seed of every draw."""
    overwrite: bool = False
    """Replace files that are there."""
    platform: _command.Platform = "auto"
    """What to compute on."""


def main() -> int:
    """Parses the flags, draws, writes."""
    flags = tyro.cli(Flags)
    from vqvae_jax.inference import sample_files  # noqa: PLC0415 - after the flags: --help needs no JAX

    if (flags.like is None) != (flags.keep_mask is None):
        raise ConfigError("--like and --keep-mask go together: a slice, and what of it is kept")
    if flags.like and flags.volume:
        raise ConfigError("--like and --volume cannot be combined; choose one")
    _command.use_platform(flags.platform)
    run_dir = flags.workdir or runs.newest()
    model = vqvae_jax.load(run_dir, flags.checkpoint)
    print(f"Run: {run_dir}, {flags.checkpoint} checkpoint, model {model.fingerprint[:12]}", flush=True)
    options = {"steps": flags.steps, "temperature": flags.temperature, "seed": flags.seed}
    if flags.like:
        written = sample_files.write_inpainted(
            model, flags.out, flags.like, flags.keep_mask, flags.count, overwrite=flags.overwrite, **options
        )
    elif flags.volume:
        written = sample_files.write_volume(model, flags.out, flags.volume, overwrite=flags.overwrite, **options)
    else:
        written = sample_files.write_slices(model, flags.out, flags.count, overwrite=flags.overwrite, **options)
    print(f"Written: {len(written)} files in {flags.out}, all drawn in {sample_files.PICTURE}")
    return 0


if __name__ == "__main__":
    _command.run(main)
