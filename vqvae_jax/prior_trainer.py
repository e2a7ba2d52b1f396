"""Training a prior over the codes of a finished run: next batch, step, log, validate, save, stop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vqvae_jax.config import Config, PriorConfig
from vqvae_jax.data import hip_mri, loader
from vqvae_jax.errors import CheckpointError, ConfigError, DataError, DivergenceError
from vqvae_jax.evaluation import pictures
from vqvae_jax.inference import samples
from vqvae_jax.inference.trained_model import TrainedModel, load
from vqvae_jax.models.prior import PASSES
from vqvae_jax.runtime import distributed, runs
from vqvae_jax.runtime.logs import MetricsLog
from vqvae_jax.runtime.randomness import Purpose, integer_for
from vqvae_jax.trainer import claimed_by_first, stop_signals
from vqvae_jax.training import checkpoint, from_run
from vqvae_jax.training.checkpoint import Checkpoints, Progress
from vqvae_jax.training.prior_data import Codes, CodeSource
from vqvae_jax.training.prior_step import (
    METRIC,
    Grids,
    codebook_of,
    create_prior_state,
    learning_rate_schedule,
    make_prior_eval_step,
    make_prior_train_step,
)
from vqvae_jax.training.state import Variables
from vqvae_jax.training.step import check_devices, replicate, split_over_devices

PICTURE = "samples.png"
DRAWN = 16
"""New slices in the picture that is drawn at the end."""
VALIDATED = 96
"""At most so many slices of the validation split, spread over it, are looked at after each epoch."""


@dataclasses.dataclass(frozen=True)
class PriorOutcome:
    """How training ended: the best bits a code on the validation split; ``stopped`` if it was told to stop."""

    step: int
    bits: float
    raw_bits: float
    stopped: bool


@distributed.explains_losses()
def train_prior(
    config: PriorConfig, run_dir: Path, *, resume: bool = False, log: Callable[[str], None] = print
) -> PriorOutcome:
    """Trains a prior over the codes of a run's best checkpoint, in ``run_dir``/prior.

    Where the run started from another with a prior of the same shape, the prior starts from that one.
    SIGTERM or Ctrl-C finishes the step, saves and returns. Several processes share it as they share training a run.

    Args:
      config: the prior's configuration; written to ``run_dir``/prior/config.json.
      run_dir: a folder that scripts/train.py wrote.
      resume: go on from the newest checkpoint of the prior.
      log: is given lines for people.

    Raises:
      ConfigError: a setting cannot work, or there is a prior and ``resume`` is not set.
      CheckpointError: the run, or a checkpoint, cannot be read or written.
      DataError: the images cannot be read.
      DivergenceError: the loss is no longer finite.
    """
    check_devices(config.batch_size)
    run = runs.load_config(run_dir)
    variables = checkpoint.load_variables(run_dir, run)
    fingerprint = TrainedModel(run, variables).fingerprint
    if resume and config.model != fingerprint:
        raise ConfigError(
            f"--workdir {run_dir}: its best checkpoint has changed since its prior was trained; remove "
            f"{run_dir / runs.PRIOR} and train another"
        )
    config = dataclasses.replace(config, model=fingerprint)
    log = log if distributed.is_first() else _quiet
    with claimed_by_first(run_dir / runs.PRIOR, resume):
        trainer = PriorTrainer(config, run, run_dir, variables, log)
        try:
            with trainer, stop_signals() as received:
                stop = distributed.Stop(received)
                trainer.start(resume)
                if distributed.is_first():
                    runs.save_config(run_dir / runs.PRIOR, config)
                trainer.run(stop)
                outcome = trainer.outcome(bool(stop))
        except OSError as error:
            raise CheckpointError(
                f"--workdir {run_dir}: cannot be written ({error}); free space and go on with --resume"
            ) from error
        if not outcome.stopped:
            drawn = samples.sample(load(run_dir), DRAWN, seed=config.seed)  # on all processes: they restore together
            if distributed.is_first():
                pictures.draw_grid(run_dir / runs.PRIOR / PICTURE, drawn)
    return outcome


class PriorTrainer:
    """Holds what a prior needs while it trains; ``train_prior`` drives it."""

    def __init__(
        self, config: PriorConfig, run: Config, run_dir: Path, variables: Variables, log: Callable[[str], None]
    ):
        self._config, self._run, self._log = config, run, log
        self._folder = run_dir / runs.PRIOR
        with distributed.first_alone():
            survey = hip_mri.look(run.data, run.model.image_size)
        train, validation = loader.open_splits(survey, run.data, run.model.image_size, ("train", "validation"), log)
        if len(train) < config.batch_size:
            raise DataError(
                f"the training split has {len(train)} slices, fewer than one batch of {config.batch_size}; "
                f"use --batch-size {len(train)} or less"
            )
        on_devices = replicate(variables)
        self._source = CodeSource(run, on_devices, train, config.neighbours, config.seed)
        self._validator = PriorValidator(config, run, CodeSource(run, on_devices, validation, config.neighbours, 0))
        self._steps = len(train) // config.batch_size
        total = config.epochs * self._steps
        self._schedule = learning_rate_schedule(config, total)
        self._state = create_prior_state(config, run.model, codebook_of(variables), total)
        if resembling := from_run.has_prior_like(run, config):
            self._state = self._state.replace(params=from_run.prior_params(run, config))
        self._step = make_prior_train_step(config, run.model)
        self._progress = Progress(slices=len(train))
        self._checkpoints = Checkpoints(self._folder, METRIC)
        self._metrics: MetricsLog | None = None
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        log(
            f"Prior: {parameters / 1e6:.2f} M parameters, {len(train)} training and {len(validation)} validation "
            f"slices of {run.model.latent_size[0]} x {run.model.latent_size[1]} codes, "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        )
        if resembling:
            log(f"It starts from the prior of {run.training.from_run}, from which the run started")

    @property
    def _raw_bits(self) -> float:
        return math.log2(self._run.model.num_embeddings)

    def start(self, resume: bool) -> None:
        """Restores the newest checkpoint if told to, and opens the logs."""
        if resume and not self._checkpoints.empty():
            self._state, self._progress = self._checkpoints.restore(self._state, "newest")
            if self._progress.slices != len(self._source):
                raise ConfigError(
                    f"the run's data have {len(self._source)} training slices, but the prior was trained on "
                    f"{self._progress.slices}; give it the data it had, or remove {self._folder}"
                )
            self._log(f"Resuming at step {int(self._state.step)}, epoch {self._progress.epoch + 1}")
        self._state = replicate(self._state)
        if distributed.is_first():
            self._metrics = MetricsLog(self._folder, int(self._state.step))

    def run(self, stop: distributed.Stop) -> None:
        """Trains until the last epoch is done, nothing has improved for long, or told to stop."""
        progress = self._progress
        while progress.epoch < self._config.epochs and progress.epochs_since < self._config.patience and not stop:
            began = time.perf_counter()
            self._train_epoch(stop)
            if progress.steps_in_epoch < self._steps:
                self._checkpoints.save(self._state, progress, None)
                break
            self._finish_epoch(time.perf_counter() - began)
        if progress.epochs_since >= self._config.patience:
            self._log(f"Stopped: no better bits for {self._config.patience} epochs")
        self._checkpoints.wait()

    def _train_epoch(self, stop: distributed.Stop) -> None:
        config, progress = self._config, self._progress
        codes = self._source.augmented(progress.epoch)
        order = np.random.default_rng((integer_for(config.seed, Purpose.PRIOR_ORDER), progress.epoch))
        batches = order.permutation(len(codes.indices))[: self._steps * config.batch_size]
        batches = batches.reshape(self._steps, config.batch_size)[:, jax.process_index() :: jax.process_count()]
        losses = []
        while progress.steps_in_epoch < self._steps and not stop.soon():
            grids = jax.tree.map(split_over_devices, codes.grids(batches[progress.steps_in_epoch]))
            self._state, loss = self._step(self._state, grids)
            losses.append(loss)
            progress.steps_in_epoch += 1
            if len(losses) > 2:
                self._collect(losses.pop(0))
        for loss in losses:
            self._collect(loss)

    def _collect(self, loss: jax.Array) -> None:
        value = float(loss)
        if not math.isfinite(value):
            raise DivergenceError("the prior's loss is not finite; remove its folder and try a lower --learning-rate")
        self._progress.sums["bits"] = self._progress.sums.get("bits", 0.0) + value

    def _finish_epoch(self, seconds: float) -> None:
        progress, step = self._progress, int(self._state.step)
        loss = progress.sums["bits"] / self._steps
        found = self._validator.run({"params": self._state.params}, VALIDATED)
        score = 1 - found["bits_per_code"] / self._raw_bits
        better = score > progress.score
        progress.score = max(score, progress.score)
        progress.epochs_since = 0 if better else progress.epochs_since + 1
        progress.epoch, progress.steps_in_epoch, progress.sums = progress.epoch + 1, 0, {}
        speed = self._steps * self._config.batch_size / seconds
        if self._metrics:
            rate = float(self._schedule(step - 1))
            train = {"bits_unknown": loss, "learning_rate": rate, "slices_per_second": speed}
            self._metrics.write(step, progress.epoch, "train", train)
            self._metrics.write(step, progress.epoch, "validation", found)
        self._log(
            f"Epoch [{progress.epoch}/{self._config.epochs}], Step {step}, Bits of unknown codes: {loss:.3f}, "
            f"Val bits a code: {found['bits_per_code']:.3f} of {self._raw_bits:g}, {speed:.1f} slices/s"
            + (" *" if better else "")
        )
        self._checkpoints.save(self._state, progress, score)

    def outcome(self, stopped: bool) -> PriorOutcome:
        """What came of it."""
        best = self._raw_bits * (1 - self._progress.score)
        return PriorOutcome(int(self._state.step), best, self._raw_bits, stopped)

    def __enter__(self) -> "PriorTrainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
        if kind is None or not distributed.several():
            with contextlib.closing(self._checkpoints):
                if self._metrics:
                    self._metrics.close()


class PriorValidator:
    """Bits that the prior spends on a split's codes, in the coding order, given the slices before."""

    def __init__(self, config: PriorConfig, run: Config, source: CodeSource):
        self._source = source
        self._step = make_prior_eval_step(config, run.model)
        self._at_once = -(-config.batch_size // jax.device_count()) * jax.local_device_count()
        self._codes: Codes | None = None

    def run(self, variables: Variables, most: int | None = None, *, alone: bool = False) -> dict[str, float]:
        """``bits_per_code``, and by pass as ``pass_0`` and so on.

        Args:
          variables: the prior's, on every device.
          most: look at so many slices, spread over the split; at all by default.
          alone: without the slices before.
        """
        if self._codes is None:
            self._codes = self._source.plain()
        count = len(self._codes.indices)
        chosen = np.unique(np.linspace(0, count - 1, min(most or count, count)).astype(int))
        own = chosen[jax.process_index() :: jax.process_count()]
        bits = {}
        for start in range(0, len(own), self._at_once):
            some = own[start : start + self._at_once]
            grids = self._codes.grids(np.resize(some, self._at_once))
            grids = Grids(grids.indices, grids.before, grids.present & (not alone))
            grids = jax.tree.map(split_over_devices, grids)
            by_pass = [np.asarray(self._step(variables, grids, np.int32(number))).ravel() for number in range(PASSES)]
            bits |= dict(zip(map(int, some), np.stack(by_pass, axis=1), strict=False))
        found = np.array(list(distributed.gathered(bits).values()))
        size = math.prod(self._codes.indices.shape[1:])
        means = {f"pass_{number}": float(value) for number, value in enumerate(found.mean(axis=0))}
        return {"bits_per_code": float(found.sum() / len(found) / size), **means}


def _quiet(line: str) -> None:
    del line
