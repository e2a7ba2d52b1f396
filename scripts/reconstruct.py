"""What a trained model makes of NIfTI files: python scripts/reconstruct.py IN OUT [--workdir runs/NAME]."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Literal

import _command
import _files
import tyro

import vqvae_jax
from vqvae_jax.data import nifti_write
from vqvae_jax.inference.trained_model import TrainedModel
from vqvae_jax.runtime import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Writes the model's reconstruction of a NIfTI file, or of each in a folder, with geometry and type as they are."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """A .nii or .nii.gz file (a slice or a volume), or a folder of them."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write, or the folder to write files of the same names into."""
    workdir: Path | None = None
    """The run's folder; the newest in runs/ by default."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best checkpoint by validation SSIM, or the newest."""
    slice_axis: int | None = None
    """Axis of a volume's slices; by default the one in the direction of training's slices."""
    difference: Path | None = None
    """Also write reconstruction less original, as float32: a file, or for a folder a folder."""
    overwrite: bool = False
    """Replace files that are there."""
    platform: _command.Platform = "auto"
    """What to compute on."""


def main() -> int:
    """Parses the flags, reconstructs each file, prints its SSIM and PSNR."""
    flags = tyro.cli(Flags)
    _files.check_apart(flags.source, flags.target, "OUT")
    if flags.difference:
        _files.check_apart(flags.source, flags.difference, "--difference")
    names = _files.found(flags.source, nifti_write.SUFFIXES)
    for place in filter(None, (flags.target, flags.difference)):
        _files.check_replaces_no_input(names, flags.source, place)
    _command.use_platform(flags.platform)
    run_dir = flags.workdir or runs.newest()
    model = vqvae_jax.load(run_dir, flags.checkpoint)
    print(f"Run: {run_dir}, {flags.checkpoint} checkpoint", flush=True)
    return _files.for_each(names, functools.partial(_reconstruct, model, flags))


def _reconstruct(model: TrainedModel, flags: Flags, name: Path) -> None:
    difference = flags.difference and flags.difference / name
    options = {"slice_axis": flags.slice_axis, "overwrite": flags.overwrite, "difference": difference}
    result = model.reconstruct_nifti(flags.source / name, flags.target / name, progress=True, **options)
    _files.say_doubt(flags.source / name, result.axis_doubt)
    count, axis = len(result.ssim_per_slice), result.slice_axis
    cut = "one slice" if axis is None else f"{count} slices along axis {axis} ({result.axis_reason})"
    _files.say(f"{flags.target / name}: SSIM {result.ssim:.4f}, PSNR {result.psnr:.2f} dB, {cut}")


if __name__ == "__main__":
    _command.run(main)
