"""Save and restore a run's state: the only file that knows Orbax.

A checkpoint holds ``model`` (parameters, batch statistics, codebook), ``optimizer`` (its state, the step, and a prior
that is trained along), ``progress`` (JSON: see `Progress`), and the CRC-32 of all their files. The newest and the best
by validation SSIM are kept.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vqvae_jax.config import Config
from vqvae_jax.errors import CheckpointError
from vqvae_jax.runtime import runs
from vqvae_jax.training.state import RateState, TrainState, Variables, init_variables

BEST_METRIC = "ssim"
CHECKSUMS = "crc32.json"
"""File of a checkpoint with the CRC-32 of the others: Orbax reads a flipped byte as another number."""

_FREE_SPACE = "; free space if the disk is full, and go on with --resume"

Which = Literal["best", "newest"]
_State = TypeVar("_State", TrainState, RateState)


@dataclasses.dataclass
class Progress:
    """Where a run is: what a checkpoint holds beside the arrays.

    ``slices`` is the number of training slices (0 where a model was imported), ``sums`` are over the epoch so far.
    ``score`` is the best so far, and ``epochs_since`` how many epochs ago it was.
    """

    epoch: int = 0
    steps_in_epoch: int = 0
    slices: int = 0
    loader: dict[str, Any] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    score: float = -1.0
    epochs_since: int = 0


class Checkpoints:
    """The checkpoints of a run.

    Args:
      run_dir: the run's folder.
      metric: the name of what is highest in the best one; no score is below -1.
      read_only: never create or delete anything.

    Raises:
      CheckpointError: reading, and nothing is there; or writing, and the folder cannot be made.
      ConfigError: its path is one that checkpoints cannot be restored from.
    """

    def __init__(self, run_dir: Path, metric: str = BEST_METRIC, *, read_only: bool = False):
        runs.check_name(run_dir)
        self._metric = metric
        self.folder = run_dir.absolute() / runs.CHECKPOINTS
        # Opening a manager creates its folder, even one for reading.
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no checkpoints; has scripts/train.py run here for an epoch?")
        self._check_metrics()
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(1),
                preservation_policy.BestN(get_metric_fn=self._best_metric, reverse=False, n=1),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            create=not read_only,
            best_fn=self._best_metric,
            best_mode="max",
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = self._explained("opened", lambda: ocp.CheckpointManager(self.folder, options=options))

    def _check_metrics(self) -> None:
        """Names the checkpoint whose metrics are damaged; Orbax would not open any of them."""
        for path in sorted(self.folder.glob("[0-9]*/metrics/metrics")):
            try:
                json.loads(path.read_text())[self._metric]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path}: is damaged; remove {path.parents[1]} to use the run's other checkpoint"
                ) from error

    def save(self, state: TrainState | RateState, progress: Progress, score: float | None) -> None:
        """Starts saving in the background. Saving a step that is already there does nothing.

        Raises:
          CheckpointError: this or the previous save failed (a full disk, say); older ones are untouched.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        if jax.process_count() > 1:
            # Each process has the whole state on its own devices; as NumPy arrays, Orbax writes the first one's.
            state = jax.device_get(state)
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.variables),
            optimizer=ocp.args.StandardSave(state.beyond_model),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        )
        # Saved between two evaluations: never the best.
        metrics = {self._metric: -1.0 if score is None or math.isnan(score) else max(score, -1.0)}
        self._explained("written", lambda: self._manager.save(step, args=items, metrics=metrics), _FREE_SPACE)

    def wait(self) -> None:
        """Returns once everything is on disk. Raises CheckpointError if it could not be written."""
        self._explained("written", self._manager.wait_until_finished, _FREE_SPACE)

    def empty(self) -> bool:
        """Whether nothing was saved yet."""
        return self._manager.latest_step() is None

    def step(self, which: Which = "newest") -> int:
        """Step of the best or newest checkpoint. Raises CheckpointError if there is none."""
        step = self._manager.best_step() if which == "best" else self._manager.latest_step()
        if step is None:
            raise CheckpointError(f"{self.folder}: holds no finished checkpoint; train for an epoch first")
        return step

    def restore(self, state: _State, which: Which = "newest") -> tuple[_State, Progress]:
        """A whole state to train on, and its progress. ``state`` gives structure and shapes.

        Raises:
          CheckpointError: there is none, it is damaged, or it belongs to another configuration.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(_abstract(state.variables)),
            optimizer=ocp.args.StandardRestore(_abstract(state.beyond_model)),
            progress=ocp.args.JsonRestore(),
        )
        found = self._restore(which, items)
        return state.restored(found["model"], found["optimizer"]), Progress(**found["progress"])

    def restore_variables(self, variables: Variables, which: Which = "best") -> Variables:
        """The model's variables alone. ``variables`` gives their shapes.

        Raises:
          CheckpointError: as for ``restore``.
        """
        items = ocp.args.Composite(model=ocp.args.StandardRestore(_abstract(variables)))
        return self._restore(which, items)["model"]

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        self._explained("written", self._manager.close, _FREE_SPACE)

    def _restore(self, which: Which, items: ocp.args.Composite) -> Any:
        step = self.step(which)
        others = [other for other in self._manager.all_steps() if other != step]
        folder = self.folder / str(step)
        way_on = f"; remove {folder} to use step {others[-1]}" if others else "; train anew"

        def read() -> Any:
            # First, since Orbax's threads print tracebacks when a read fails.
            _check_files(folder, set(items.keys()))
            _check_shapes(folder, items["model"].item)
            return self._manager.restore(step, args=items)

        return self._explained(f"restored at step {step}", read, way_on)

    def _write_checksums(self) -> None:
        """Completes a checkpoint that Orbax has written and is about to give its final name."""
        if jax.process_index() == 0:
            for folder in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                files = [path for path in folder.rglob("*") if path.is_file()]
                checksums = {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}
                (folder / CHECKSUMS).write_text(json.dumps(checksums))

    def _best_metric(self, metrics: dict[str, float]) -> float:
        return metrics[self._metric]

    def _explained(self, done: str, action: Callable[[], Any], way_on: str = "") -> Any:
        """Runs an Orbax call; whatever it raises becomes one line that names the folder."""
        try:
            return action()
        except Exception as error:  # Orbax and TensorStore raise many kinds
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(f"{self.folder}: checkpoint could not be {done} ({reason}){way_on}") from error


def load_variables(run_dir: Path, config: Config, which: Which = "best") -> Variables:
    """The variables of a finished run's model. Raises CheckpointError if they cannot be read."""
    shapes = jax.eval_shape(lambda: init_variables(config.model, jax.random.key(0)))
    checkpoints = Checkpoints(run_dir, read_only=True)
    try:
        return checkpoints.restore_variables(shapes, which)
    finally:
        checkpoints.close()


def _check_files(folder: Path, items: set[str]) -> None:
    """Raises ValueError where a file of these items is not what was written."""
    for name, expected in json.loads((folder / CHECKSUMS).read_text()).items():
        path = folder / name
        if name.split("/")[0] in items and not (path.is_file() and zlib.crc32(path.read_bytes()) == expected):
            raise ValueError(f"{name} is {'damaged' if path.is_file() else 'missing'}")


def _check_shapes(folder: Path, variables: Any) -> None:
    """Raises ValueError where a checkpoint's model has other variables than these."""

    def shapes(tree: Any) -> dict[str, tuple]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    stored = shapes(ocp.StandardCheckpointHandler().metadata(folder / "model").tree)
    expected = shapes(variables)
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            found, wanted = stored.get(name, "absent"), expected.get(name, "absent")
            raise ValueError(f"{name} is {found}, but {wanted} in the model of config.json")


def _abstract(tree: Any) -> Any:
    """Shapes and types, to be put on this process's first device wherever they were saved."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = jax.eval_shape(lambda: leaf) if not hasattr(leaf, "shape") else leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape_of, tree)
