"""See what training would take from a data set: python scripts/inspect_data.py PATH [--write FILE.csv]."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import _command
import tyro

from vqvae_jax.config import DataConfig
from vqvae_jax.data.roles import IMAGE
from vqvae_jax.data.survey import Survey, find_data
from vqvae_jax.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Prints what a data set holds, warnings first. It reads names and headers, and trains nothing."""

    path: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")] = None
    """A zip, a folder or a table of NIfTI files. By default the place where HipMRI's slices belong."""
    write: Path | None = None
    """Also write a table with a row for each file. It can be edited, and given to train.py as --data FILE.csv."""
    case_pattern: str | None = None
    """Regular expression: what it matches in a file's path names the patient."""
    slice_axis: int | None = None
    """Axis along which volumes are cut into slices."""
    slice_direction: Literal["left-right", "front-back", "head-foot"] | None = None
    """Cut volumes along this direction of the body, whatever the order of their axes."""


def main() -> int:
    """Parses the flags, looks, prints."""
    flags = tyro.cli(Flags)
    if flags.write and flags.write.suffix.lower() != ".csv":
        raise DataError(f"--write {flags.write}: give a name that ends in .csv")
    config = DataConfig(
        case_pattern=flags.case_pattern, slice_axis=flags.slice_axis, slice_direction=flags.slice_direction
    )
    survey = Survey(find_data(flags.path), config)
    for warning in survey.warnings:
        print(f"Warning: {warning}")
    for line in survey.facts():
        print(line)
    for row in survey.rows:
        if row.role != IMAGE or row.reason:
            print(f"  {row.path}: {row.role}{f' ({row.reason})' if row.reason else ''}")
    if flags.write:
        survey.write(flags.write)
        print(f"Written: {flags.write} ({len(survey.rows)} files); edit it, and train with --data {flags.write}")
    return 0


if __name__ == "__main__":
    _command.run(main)
