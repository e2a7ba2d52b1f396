"""A run's folder: the names of what it holds, making one, finding the newest."""

from pathlib import Path

from vqvae_jax.config import Config
from vqvae_jax.errors import CheckpointError, ConfigError
from vqvae_jax.runtime.config_file import from_json, to_json
from vqvae_jax.runtime.files import write_whole

RUNS = Path("runs")
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
EVAL = "eval"


def claim(run_dir: Path, resume: bool) -> None:
    """Makes sure that a run may be written to a folder, before any long work.

    Raises:
      ConfigError: it holds a run, or a run's checkpoints, and ``resume`` is not set; or it cannot be written.
    """
    if (run_dir / CONFIG).exists() and not resume:
        raise ConfigError(f"--workdir {run_dir} already holds a run; add --resume to go on with it, or choose another")
    checkpoints = run_dir / CHECKPOINTS
    if not resume and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise ConfigError(f"{checkpoints} holds another run's checkpoints; remove it, or choose another --workdir")
    probe = run_dir / ".writable"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir {run_dir} cannot be written ({error.strerror}); choose another") from error


def save_config(run_dir: Path, config: Config) -> None:
    """Writes config.json, replacing an older one. Raises ConfigError if the folder cannot be written."""
    try:
        write_whole(run_dir / CONFIG, to_json(config))
    except OSError as error:
        raise ConfigError(f"--workdir {run_dir} cannot be written ({error.strerror}); choose another") from error


def load_config(run_dir: Path) -> Config:
    """The configuration of a run. Raises CheckpointError if there is no run, ConfigError if it is damaged."""
    path = run_dir / CONFIG
    try:
        text = path.read_text()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); --workdir must be a folder that scripts/train.py wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text ({error})") from error
    return from_json(text, path)


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
