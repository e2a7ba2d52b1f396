"""A run's folder: the names of what it holds, making one, finding the newest."""

import contextlib
import fcntl
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqvae_jax.config import Config, PriorConfig
from vqvae_jax.errors import CheckpointError, ConfigError
from vqvae_jax.runtime.config_file import from_json, to_json
from vqvae_jax.runtime.files import write_whole

RUNS = Path("runs")
CONFIG = "config.json"
DATA = "data.csv"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
EVAL = "eval"
PRIOR = "prior"
"""The folder of the prior over a run's codes: itself as a run's folder."""
LOCK = ".lock"
"""Held by the process that trains in the folder."""
_NOT_RESTORED = re.compile(r"\[[^/]+\]|\\|\*\*|(?<=/)gs:(?=/)")
"""Orbax takes a path as a pattern when it restores: a pair of brackets, a backslash or ** then find nothing; and it
takes a folder named gs: for a bucket."""


def new(preset: str) -> Path:
    """Makes a folder for a new run, runs/PRESET-TIMESTAMP, which no other process has.

    Raises:
      ConfigError: it cannot be made.
    """
    name = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        run_dir = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"{run_dir} cannot be made ({error.strerror}); give another folder by --workdir"
            ) from error
        return run_dir
    raise AssertionError("the numbers do not end")


@contextlib.contextmanager
def claimed(run_dir: Path, resume: bool) -> Iterator[None]:
    """Holds a run's folder, so that no other process trains in it; a folder that stays empty is removed.

    Raises:
      ConfigError: another process holds it; it has a run, or a run's checkpoints, and ``resume`` is not set; it cannot
        be written; or its name is one that checkpoints cannot be restored from.
    """
    check_name(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(f"--workdir {run_dir} cannot be written ({error.strerror}); choose another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"--workdir {run_dir}: another process trains in it ({lock.read().strip()}); wait for it, or choose "
                "another folder"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        try:
            _check_unused(run_dir, resume)
            yield
        finally:
            if [path.name for path in run_dir.iterdir()] == [LOCK]:
                (run_dir / LOCK).unlink()
                run_dir.rmdir()


def _check_unused(run_dir: Path, resume: bool) -> None:
    if resume:
        return
    if (run_dir / CONFIG).exists():
        raise ConfigError(f"--workdir {run_dir} already holds a run; add --resume to go on with it, or choose another")
    checkpoints = run_dir / CHECKPOINTS
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise ConfigError(f"{checkpoints} holds another run's checkpoints; remove it, or choose another --workdir")


def check_name(run_dir: Path) -> None:
    """Raises ConfigError where Orbax would save checkpoints in a folder, and find none when it looks for them."""
    if odd := _NOT_RESTORED.search(f"{run_dir.absolute()}/"):
        raise ConfigError(
            f"--workdir {run_dir}: checkpoints cannot be restored from a path with {odd[0]} ({run_dir.absolute()}); "
            "choose another folder"
        )


def save_config(run_dir: Path, config: Config | PriorConfig) -> None:
    """Writes config.json, replacing an older one. Raises ConfigError if the folder cannot be written."""
    try:
        write_whole(run_dir / CONFIG, to_json(config))
    except OSError as error:
        raise ConfigError(f"--workdir {run_dir} cannot be written ({error.strerror}); choose another") from error


def load_config(run_dir: Path) -> Config:
    """The configuration of a run. Raises CheckpointError if there is no run, ConfigError if it is damaged."""
    return _load_config(run_dir, Config, "scripts/train.py")


def load_prior_config(run_dir: Path) -> PriorConfig:
    """The configuration of a run's prior. Errors as for ``load_config``."""
    return _load_config(run_dir / PRIOR, PriorConfig, "scripts/train_prior.py")


def _load_config(run_dir: Path, kind: Any, writer: str) -> Any:
    path = run_dir / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); expected a folder that {writer} wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text ({error})") from error
    return from_json(text, path, kind)


def newest(folder: Path = RUNS) -> Path:
    """The run in ``folder`` that was written to last. Raises CheckpointError if there is none."""
    found = [config.parent for config in folder.glob(f"*/{CONFIG}")]
    if not found:
        raise CheckpointError(
            f"no run in {folder}/; train one with scripts/train.py, or give its folder with --workdir"
        )
    return max(
        found,
        key=lambda run: max((run / name).stat().st_mtime for name in (CONFIG, METRICS) if (run / name).exists()),
    )
