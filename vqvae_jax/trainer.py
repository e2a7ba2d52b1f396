"""The training loop alone: next batch, step, log, evaluate, save, stop."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from vqvae_jax.config import Config, TrainingConfig
from vqvae_jax.data import hip_mri, loader
from vqvae_jax.data.survey import Survey, find_data
from vqvae_jax.errors import CheckpointError, ConfigError, DataError, DivergenceError
from vqvae_jax.evaluation import evaluate
from vqvae_jax.evaluation.evaluator import Evaluator
from vqvae_jax.evaluation.table import Evaluation
from vqvae_jax.models import vgg_weights
from vqvae_jax.runtime import distributed, runs
from vqvae_jax.runtime.logs import MetricsLog
from vqvae_jax.runtime.randomness import Purpose, integer_for
from vqvae_jax.training import from_run
from vqvae_jax.training.checkpoint import Checkpoints, Progress
from vqvae_jax.training.rate_step import RISING_SHARE, make_rate_train_step
from vqvae_jax.training.state import Variables, create_train_state, learning_rate_schedule
from vqvae_jax.training.step import (
    StepMetrics,
    check_devices,
    check_ssim,
    fitted_train_step,
    make_train_step,
    replicate,
    split_over_devices,
)

_STEPS_IN_FLIGHT = 2
"""Steps whose metrics are left on the device, so that reading them never makes it wait."""
FEW_STEPS = 100
"""Fewer steps are too few to learn much: after 108, half-size slices have an SSIM of 0.86 (docs/results.md)."""
_LABELS = {
    "loss": "Loss",
    "l1": "L1",
    "l2": "L2",
    "perceptual": "Perceptual",
    "quantizer": "Quantizer",
    "ssim_loss": "1 - SSIM",
    "bits_per_pixel": "Bits a pixel",
}
"""The parts of the loss in the line of an epoch, by their names in the logs."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended: ``evaluation`` of the best checkpoint on the test split, or None if stopped early."""

    step: int
    evaluation: Evaluation | None


@dataclasses.dataclass
class Clock:
    """Seconds an epoch's ``images`` took, and how many of them were spent waiting for input."""

    images: int = 0
    total: float = 1e-9
    waiting: float = 0.0


@distributed.explains_losses()
def train_and_evaluate(
    config: Config, run_dir: Path, *, resume: bool = False, log: Callable[[str], None] = print
) -> Outcome:
    """Trains to ``config.training.epochs``, then evaluates the best checkpoint on the test split.

    SIGTERM or Ctrl-C finishes the step, saves and returns. Of several processes (see ``distributed``) each is
    given the same arguments; all stop after the same step if one is told to, and the first writes and logs.

    Args:
      config: the whole configuration; written to ``run_dir``/config.json.
      run_dir: the run's folder.
      resume: go on from the newest checkpoint in ``run_dir``.
      log: is given lines for people.

    Raises:
      ConfigError: a setting cannot work, or ``run_dir`` holds a run and ``resume`` is not set.
      DataError, WeightsError: the images or the VGG weights cannot be read.
      CheckpointError: a checkpoint cannot be written or read.
      DivergenceError: the loss is no longer finite; the last good checkpoint is left.
      PeerError: another process has ended or cannot be reached.
    """
    check_devices(config.training.batch_size, config.training.accumulate)
    check_ssim(config)
    config = _with_absolute_paths(config)
    if not resume:
        from_run.check(config)
    with claimed_by_first(run_dir, resume):
        return _train_and_evaluate(config, run_dir, resume, log if distributed.is_first() else _quiet)


def _train_and_evaluate(config: Config, run_dir: Path, resume: bool, log: Callable[[str], None]) -> Outcome:
    # What is cheap comes first: weights may be fetched, and a data set built, for a long time.
    with distributed.first_alone():
        survey = hip_mri.look(config.data, config.model.image_size)
    for line in survey.summary():
        log(line)
    _check_length(config.training, survey.slices("train"), log)
    config = _with_direction(config, survey)
    with distributed.first_alone():
        vgg_variables = _load_vgg(config)
    trainer = Trainer(config, run_dir, survey, vgg_variables, log)
    try:
        with trainer, stop_signals() as received:
            stop = distributed.Stop(received)
            trainer.start(resume)
            if distributed.is_first():
                runs.save_config(run_dir, config)
                survey.write(run_dir / runs.DATA)
                trainer.save_prior_config()
            trainer.run(stop)
            if stop:
                return Outcome(trainer.step, None)
            trainer.finish()
    except OSError as error:
        raise CheckpointError(
            f"--workdir {run_dir}: cannot be written ({error}); free space and go on with --resume"
        ) from error
    return Outcome(trainer.step, evaluate.evaluate_run(run_dir, log=_quiet).evaluation)


@contextlib.contextmanager
def claimed_by_first(run_dir: Path, resume: bool) -> Iterator[None]:
    """`runs.claimed` by the first process; the others see that they share its folder."""
    with contextlib.ExitStack() as stack:
        with distributed.first_alone():
            if distributed.is_first():
                stack.enter_context(runs.claimed(run_dir, resume))
            elif not run_dir.is_dir():
                raise ConfigError(
                    f"--workdir {run_dir}: is not here, where process 0 made it; use a folder that all processes share"
                )
        yield


def _with_absolute_paths(config: Config) -> Config:
    """The configuration with paths that hold in every working directory."""
    data, weights = config.data, config.loss.vgg_weights
    place = data.data if data.data == hip_mri.PHANTOM else os.path.abspath(find_data(data.data))
    data = dataclasses.replace(data, data=place, tfds_dir=os.path.abspath(data.tfds_dir))
    if weights not in (vgg_weights.AUTO, vgg_weights.RANDOM):
        weights = os.path.abspath(Path(weights).expanduser())
    training = config.training
    if training.from_run is not None:
        training = dataclasses.replace(training, from_run=os.path.abspath(training.from_run))
    loss = dataclasses.replace(config.loss, vgg_weights=weights)
    return dataclasses.replace(config, data=data, loss=loss, training=training)


def _with_direction(config: Config, survey: Survey) -> Config:
    """The configuration with the anatomical direction that volumes are cut along, for those who use the model."""
    direction = config.data.slice_direction or survey.direction
    return dataclasses.replace(config, data=dataclasses.replace(config.data, slice_direction=direction))


def _check_length(settings: TrainingConfig, slices: int, log: Callable[[str], None]) -> None:
    """Raises ConfigError or DataError where a training cannot begin; warns where it is too short to learn."""
    if slices < settings.batch_size:
        raise DataError(
            f"the training split has {slices} slices, fewer than one batch of {settings.batch_size}; "
            f"use --batch-size {slices} or less"
        )
    batches = slices // settings.batch_size
    steps = settings.epochs * batches
    if settings.warmup_steps >= steps:
        raise ConfigError(
            f"--warmup-steps {settings.warmup_steps} is not below the {steps} steps of this training "
            f"({settings.epochs} epochs of {batches}); warm up for a tenth of them, say"
        )
    if steps < FEW_STEPS:
        log(
            f"Warning: {steps} steps ({settings.epochs} epochs of {batches}) are too few to learn much; more "
            f"--epochs or a smaller --batch-size gives more, and {FEW_STEPS} are a beginning"
        )


def _load_vgg(config: Config) -> Variables | None:
    """VGG16's variables down to the deepest perceptual layer, or None where the perceptual weight is 0."""
    if not config.loss.perceptual_weight:
        return None
    return vgg_weights.load(config.loss.vgg_weights, *config.loss.perceptual_layers)


class Trainer:
    """Holds what a run needs while it trains; ``train_and_evaluate`` drives it."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        survey: Survey,
        vgg_variables: Variables | None,
        log: Callable[[str], None],
    ):
        self._config = config
        self._run_dir = run_dir
        self._log = log
        splits = ("train", "validation")
        train, validation = loader.open_splits(survey, config.data, config.model.image_size, splits, log)
        self._checkpoints = Checkpoints(run_dir)
        self._fresh = self._checkpoints.empty()
        self._prior = None
        if config.loss.rate_weight:
            self._prior = from_run.prior_config(config) if self._fresh else runs.load_prior_config(run_dir)
        self._loader = loader.TrainLoader(
            loader.Clips(train, self._prior.neighbours) if self._prior else train,
            config.training.batch_size,
            integer_for(config.training.seed, Purpose.ORDER),
            parts=config.training.accumulate,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._schedule = learning_rate_schedule(config, self._loader.batches_per_epoch)
        self._validator = Evaluator(config, validation)
        drawn = np.linspace(0, len(validation) - 1, min(config.training.sample_images, len(validation)))
        self._drawn = [int(index) for index in drawn]
        self._vgg_variables = replicate(vgg_variables)
        self._steps = config.training.epochs * self._loader.steps_per_epoch
        self._state = create_train_state(config, self._loader.batches_per_epoch)
        if config.training.from_run and self._fresh:
            self._state = from_run.started(config, self._state)
            log(f"Starts from the best checkpoint of {config.training.from_run}")
        if self._prior:
            self._state = from_run.beside_prior(config, self._prior, self._state, self._steps)
            self._state = from_run.with_prior(config, self._prior, self._state) if self._fresh else self._state
        self._train_step: Callable | None = None
        self._progress = Progress(slices=len(train))
        self._slices = len(train)
        self._metrics: MetricsLog | None = None
        self._compiled = False
        self._bits = 0.0
        self._describe(len(train), len(validation))

    @property
    def step(self) -> int:
        """Moves of the parameters since the run began."""
        return int(self._state.step) // self._config.training.accumulate

    def _describe(self, train: int, validation: int) -> None:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        devices, processes = jax.devices(), jax.process_count()
        self._log(
            f"Preset {self._config.preset}: {parameters / 1e6:.2f} M parameters, {train} training and {validation} "
            f"validation slices, {len(devices)} x {devices[0].device_kind}"
            + (f" in {processes} processes" if processes > 1 else "")
        )
        if self._config.training.learning_rate == "auto":
            width = self._config.model.hidden_channels
            self._log(f"Learning rate: {self._config.learning_rate:.3g}, for width {width} (--learning-rate)")
        loss = self._config.loss
        if loss.perceptual_weight and loss.vgg_weights == vgg_weights.RANDOM:
            layers = ", ".join(loss.perceptual_layers)
            self._log(
                f"Perceptual loss: UNTRAINED, random VGG16 features at {layers} (fixed seed); "
                "--vgg-weights auto or a file gives trained ones"
            )

    def start(self, resume: bool) -> None:
        """Restores the newest checkpoint if told to, and opens the logs."""
        if resume and self._checkpoints.empty():
            self._log("Nothing was saved yet: starting from the beginning")
        elif resume:
            self._state, self._progress = self._checkpoints.restore(self._state, "newest")
            self._check_slices()
            if self._progress.loader:  # empty where the model was imported
                self._loader.set_state(self._progress.loader)
            self._log(f"Resuming at step {self.step}, epoch {self._progress.epoch + 1}")
        self._state = replicate(self._state)
        if distributed.is_first():
            self._metrics = MetricsLog(self._run_dir, self.step)

    def _check_slices(self) -> None:
        before = self._progress.slices
        if before not in (0, self._slices):
            raise ConfigError(
                f"--data has {self._slices} training slices, but the run was trained on {before}; "
                "give the data it was started with, or start another run"
            )
        self._progress.slices = self._slices

    def run(self, stop: distributed.Stop) -> None:
        """Trains until the last epoch is done or told to stop."""
        while self._progress.epoch < self._config.training.epochs and not stop:
            clock = self._train_epoch(stop)
            if self._progress.steps_in_epoch < self._loader.steps_per_epoch:
                self._save(None)
                break
            self._finish_epoch(clock)
        self._checkpoints.wait()

    def _train_epoch(self, stop: distributed.Stop) -> Clock:
        progress, clock = self._progress, Clock()
        in_flight: collections.deque = collections.deque()
        steps = self._loader.steps_per_epoch
        title = f"Epoch {progress.epoch + 1}/{self._config.training.epochs}"
        hidden = distributed.hides_progress()
        with tqdm.tqdm(total=steps, initial=progress.steps_in_epoch, desc=title, leave=False, disable=hidden) as bar:
            begin = time.perf_counter()
            while progress.steps_in_epoch < steps and not stop.soon():
                asked = time.perf_counter()
                images = jax.tree.map(split_over_devices, next(self._loader))
                clock.waiting += time.perf_counter() - asked
                if self._train_step is None:
                    self._train_step = self._compile(images)
                self._state, metrics = self._train_step(self._state, images, self._vgg_variables)
                progress.steps_in_epoch += 1
                clock.images += self._config.training.batch_size // self._config.training.accumulate
                in_flight.append((progress.epoch * steps + progress.steps_in_epoch, metrics))
                if not self._compiled:
                    jax.block_until_ready(metrics)
                    self._compiled = True
                    self._log(f"Compiled and ran the first step in {time.perf_counter() - asked:.1f} s")
                    begin, clock = time.perf_counter(), Clock()  # compiling says nothing of the speed
                if len(in_flight) > _STEPS_IN_FLIGHT:
                    self._collect(*in_flight.popleft(), bar)
                bar.update()
            for number, metrics in in_flight:
                self._collect(number, metrics, bar)
            clock.total = time.perf_counter() - begin
        progress.loader = self._loader.get_state()
        return clock

    def _compile(self, images: Any) -> Callable:
        make = functools.partial(make_rate_train_step, prior_config=self._prior, steps=self._steps)
        make = make if self._prior else make_train_step
        step, remat = fitted_train_step(make, self._config, self._state, images, self._vgg_variables)
        if self._config.training.remat == "auto" and remat != "none":
            self._log(f"Memory: --remat {remat}, since the step would not fit with less computed again")
        return step

    def _collect(self, number: int, metrics: StepMetrics, bar: tqdm.tqdm) -> None:
        """Adds the scalars of step ``number`` to the epoch's sums; raises DivergenceError if one is not finite."""
        config = self._config.loss
        values = {
            "loss": metrics.losses.total,
            config.reconstruction: metrics.losses.reconstruction,
            "perceptual": metrics.losses.perceptual,
            "quantizer": metrics.losses.quantizer,
            "gradient_norm": metrics.gradient_norm,
        }
        if config.ssim_weight:
            values["ssim_loss"] = metrics.losses.ssim
        if config.rate_weight:
            values["bits_per_pixel"] = metrics.losses.rate
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if not all(map(math.isfinite, values.values())):
            raise DivergenceError(self._divergence(-(-number // self._config.training.accumulate), values))
        for name, value in values.items():
            self._progress.sums[name] = self._progress.sums.get(name, 0.0) + value
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def _divergence(self, step: int, values: dict[str, float]) -> str:
        found = ", ".join(f"{name} {value:g}" for name, value in values.items())
        try:
            self._checkpoints.wait()
            saved = self._checkpoints.step() // self._config.training.accumulate
            kept = f"the last good checkpoint is at step {saved}"
        except CheckpointError:
            kept = "no checkpoint was saved before it"
        return f"the loss is not finite at step {step} ({found}); {kept}; try a lower --learning-rate"

    def _finish_epoch(self, clock: Clock) -> None:
        progress, steps = self._progress, self._loader.steps_per_epoch
        means = {name: total / steps for name, total in progress.sums.items()}
        result = self._validator.run(self._state.variables, keep=self._drawn)
        summary = result.summary()
        progress.epoch, progress.steps_in_epoch, progress.sums = progress.epoch + 1, 0, {}
        speed = {"images_per_second": clock.images / clock.total, "input_wait": clock.waiting / clock.total}
        rate = {"learning_rate": float(self._schedule(self.step - 1))}
        if self._metrics:
            self._metrics.write(self.step, progress.epoch, "train", means | rate | speed)
            self._metrics.write(self.step, progress.epoch, "validation", summary)
        parts = ", ".join(f"{label}: {means[name]:.4f}" for name, label in _LABELS.items() if name in means)
        self._log(
            f"Epoch [{progress.epoch}/{self._config.training.epochs}], {parts}, "
            f"Val SSIM: {summary['ssim']:.4f}, Val PSNR: {summary['psnr']:.2f} dB, "
            f"Perplexity: {summary['perplexity']:.1f}, codes used: {summary['codebook_usage']:.1%}, "
            f"{speed['images_per_second']:.1f} images/s, Input wait: {speed['input_wait']:.1%}"
        )
        if self._drawn:
            path = self._run_dir / runs.SAMPLES / f"epoch_{progress.epoch:04d}.png"
            pairs = [result.kept[index] for index in self._drawn]
            evaluate.draw(path, result, pairs, [f"slice {index + 1}" for index in self._drawn])
        risen = not self._prior or self.step >= RISING_SHARE * self._steps
        self._bits = means.get("bits_per_pixel", self._bits)
        self._save(summary["ssim"] if risen else None)

    def save_prior_config(self) -> None:
        """Writes the configuration of a prior that is trained along, which a resumed run goes on with."""
        if self._prior and self._fresh:
            from_run.save_config(self._run_dir, self._prior)

    def finish(self) -> None:
        """Writes the prior that was trained along, of the best checkpoint, to the run's folder."""
        if self._prior:
            state, progress = self._checkpoints.restore(self._state, "best")
            share = 1 - self._bits * self._config.model.downsampling**2 / math.log2(self._config.model.num_embeddings)
            from_run.save_prior(self._run_dir, self._config, state, progress, share if self._bits else 0.0)

    def _save(self, ssim: float | None) -> None:
        self._checkpoints.save(self._state, self._progress, ssim)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
        if kind is None or not distributed.several():  # else it would wait for processes that may be gone
            self.close()

    def close(self) -> None:
        """Ends logs and checkpoint threads."""
        with contextlib.closing(self._checkpoints):
            if self._metrics:
                self._metrics.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGTERM or SIGINT; a second one acts as it would without us."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        restore()

    try:
        for number in numbers:
            signal.signal(number, note)
    except ValueError:  # not the main thread: signals are the caller's business
        before.clear()
    try:
        yield received
    finally:
        restore()


def _quiet(line: str) -> None:
    del line
