"""What commands share that make one file from another: a file or a folder of them, mirrored, and what went wrong."""

import sys
from collections.abc import Callable
from pathlib import Path

import _command
import tqdm

from vqvae_jax.errors import DataError


def check_apart(source: Path, target: Path, name: str) -> None:
    """Raises DataError where what is written (``name`` for people) would lie in the input or take its place."""
    if not source.exists():
        raise DataError(f"{source}: does not exist; give a file or a folder to read")
    if source.is_dir() and target.exists() and not target.is_dir():
        raise DataError(f"{target}: {name} is a file, but the input a folder; give a folder")
    if target.resolve() == source.resolve():
        raise DataError(f"{target}: {name} is the input itself; choose another place")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{target}: {name} lies in the input's folder; choose a place outside of it")


def check_replaces_no_input(names: list[Path], source: Path, target: Path) -> None:
    """Raises DataError where an output in ``target`` would take the place of another file of the input."""
    inputs = {(source / name).resolve() for name in names}
    for name in names:
        if (target / name).resolve() in inputs:
            raise DataError(f"{target / name}: is a file of the input, which would be replaced; choose another place")


def found(source: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Paths relative to ``source`` of the files in it, hidden ones left out; of ``source`` itself if it is a file.

    Raises:
      DataError: there are none.
    """
    if not source.is_dir():
        return [Path()]
    paths = [path for path in sorted(source.rglob("*")) if path.name.endswith(suffixes) and not path.is_dir()]
    below = [path.relative_to(source) for path in paths]
    names = [name for name in below if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise DataError(f"{source}: holds no {' or '.join(suffixes)} files")
    return names


def renamed(names: list[Path], suffixes: tuple[str, ...], suffix: str) -> dict[Path, Path]:
    """What is made of each of ``names``: the same name with another suffix; nothing else for the input itself.

    Raises:
      DataError: two would have the same name.
    """
    made: dict[Path, Path] = {}
    for name in names:
        old = next((old for old in suffixes if name.name.endswith(old)), "")
        new = name.with_name(name.name.removesuffix(old) + suffix) if name.name else name
        if new in made:
            raise DataError(f"{name} and {made[new]} would both become {new}; rename one of them")
        made[new] = name
    return {name: new for new, name in made.items()}


def for_each(names: list[Path], action: Callable[[Path], None]) -> int:
    """Calls ``action`` on each; one that fails is a line on stderr and does not stop the others. The exit status."""
    status = 0
    with tqdm.tqdm(names, unit="file", leave=False, disable=None if len(names) > 1 else True) as bar:
        for name in bar:
            try:
                action(name)
            except Exception as error:
                explained = _command.explain(error)
                if explained is None:
                    raise
                with bar.external_write_mode(sys.stderr):
                    status = _command.complain(explained, _command.USER_ERROR)
    return status


def say_doubt(path: Path, doubt: str) -> None:
    """Prints a warning about the axis a file was cut along, where there is a doubt."""
    if doubt:
        say(f"Warning: {path}: {doubt}; --slice-axis settles it")


def say(line: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.tqdm.write(line)
    sys.stdout.flush()
