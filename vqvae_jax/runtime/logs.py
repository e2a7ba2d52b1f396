"""The scalars of a run, written twice: metrics.jsonl for programs, event files for TensorBoard."""

import json
import math
from pathlib import Path

from vqvae_jax.runtime import runs
from vqvae_jax.runtime.files import write_whole


class MetricsLog:
    """Appends scalars to a run's logs.

    Args:
      run_dir: the run's folder.
      resume_step: drop what an earlier process logged after this step, which it did not save.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0):
        # Imports all of PyTorch where that is installed, which takes a second that other commands need not wait.
        from tensorboardX import SummaryWriter  # noqa: PLC0415

        self._path = run_dir / runs.METRICS
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= resume_step]
            write_whole(self._path, "".join(f"{line}\n" for line in kept))
        self._events = SummaryWriter(str(run_dir), purge_step=resume_step + 1)

    def write(self, step: int, epoch: int, split: str, scalars: dict[str, float]) -> None:
        """One line and one event a scalar. A scalar that is not finite is null in the line."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, "split": split, **finite}) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(f"{split}/{name}", value, step)
        self._events.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._events.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, from a process that was killed
