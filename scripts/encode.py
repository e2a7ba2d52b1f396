"""Store NIfTI files as a model's codes: python scripts/encode.py IN OUT.vqz [--workdir runs/NAME]."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import _command
import _files
import tyro

import vqvae_jax
from vqvae_jax.data import nifti_write
from vqvae_jax.inference import vqz_files
from vqvae_jax.runtime import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Writes the codes of a NIfTI file, or of each in a folder, as .vqz files, and says how small they are."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """A .nii or .nii.gz file (a 2-D slice or a 3-D volume), or a folder of them."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The .vqz file to write, or a folder, which is laid out as the input is."""
    workdir: Path | None = None
    """The run's folder; the newest in runs/ by default."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best checkpoint by validation SSIM, or the newest."""
    slice_axis: int | None = None
    """Axis of a volume's slices; by default the one in the direction of training's slices."""
    effort: Literal[0, 1, 2, 3] = 0
    """How hard to look for codes of few bits and little error; needs a prior. 0 is fast, 3 takes seconds a slice."""
    overwrite: bool = False
    """Replace files that are there."""
    platform: _command.Platform = "auto"
    """What to compute on."""


def main() -> int:
    """Parses the flags, encodes each file, prints what it became."""
    flags = tyro.cli(Flags)
    _files.check_apart(flags.source, flags.target, "OUT")
    names = _files.renamed(_files.found(flags.source, nifti_write.SUFFIXES), nifti_write.SUFFIXES, ".vqz")
    _command.use_platform(flags.platform)
    run_dir = flags.workdir or runs.newest()
    model = vqvae_jax.load(run_dir, flags.checkpoint)
    print(f"Run: {run_dir}, {flags.checkpoint} checkpoint, model {model.fingerprint[:12]}", flush=True)
    if model.prior_doubt:
        _files.say(f"Warning: {model.prior_doubt}")

    def encode(name: Path) -> None:
        path_out = flags.target / names[name]
        options = {"slice_axis": flags.slice_axis, "effort": flags.effort, "overwrite": flags.overwrite}
        made = vqz_files.encode_file(model, flags.source / name, path_out, **options, progress=True)
        _files.say_doubt(flags.source / name, made.axis_doubt)
        _files.say(f"{path_out}: {made}")

    return _files.for_each(list(names), encode)


if __name__ == "__main__":
    _command.run(main)
