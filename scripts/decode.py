"""Make NIfTI files of stored codes: python scripts/decode.py IN.vqz OUT.nii.gz [--workdir runs/NAME]."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import _command
import _files
import tyro

import vqvae_jax
from vqvae_jax.coding import vqz
from vqvae_jax.inference import vqz_files
from vqvae_jax.runtime import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Writes the NIfTI file that a .vqz file was made from, or each in a folder, as the model remembers it."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """A .vqz file, or a folder of them."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The .nii or .nii.gz file to write, or a folder, which is laid out as the input is."""
    workdir: Path | None = None
    """The folder of the run that encoded; the newest in runs/ by default."""
    checkpoint: Literal["best", "newest"] = "best"
    """The best checkpoint by validation SSIM, or the newest."""
    force: bool = False
    """Decode with another model than the one that encoded, to another image."""
    salvage: bool = False
    """Take what is whole of a damaged file that a prior coded; slices that are lost are black."""
    overwrite: bool = False
    """Replace files that are there."""
    platform: _command.Platform = "auto"
    """What to compute on."""


def main() -> int:
    """Parses the flags, decodes each file, prints what it became."""
    flags = tyro.cli(Flags)
    _files.check_apart(flags.source, flags.target, "OUT")
    names = _files.renamed(_files.found(flags.source, vqz_files.SUFFIXES), vqz_files.SUFFIXES, ".nii.gz")
    _command.use_platform(flags.platform)
    run_dir = flags.workdir or runs.newest()
    model = vqvae_jax.load(run_dir, flags.checkpoint)
    print(f"Run: {run_dir}, {flags.checkpoint} checkpoint, model {model.fingerprint[:12]}", flush=True)

    def decode(name: Path) -> None:
        path_out = flags.target / names[name]
        options = {"force": flags.force, "salvage": flags.salvage, "overwrite": flags.overwrite, "progress": True}
        lost = vqz_files.decode_file(model, flags.source / name, path_out, **options)
        if lost:
            _files.say(f"Warning: {flags.source / name}: is damaged: {vqz.described(lost)} are lost, and black")
        _files.say(f"Written: {path_out}")

    return _files.for_each(list(names), decode)


if __name__ == "__main__":
    _command.run(main)
