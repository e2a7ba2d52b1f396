"""The training loop alone: next batch, step, log, evaluate, save, stop."""

import collections
import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from vqvae_jax import checkpoint, distributed, evaluation, logs, training, workdir
from vqvae_jax.config import Config
from vqvae_jax.data import hip_mri, loader
from vqvae_jax.errors import CheckpointError, ConfigError, DivergenceError
from vqvae_jax.models import vgg_weights

_STEPS_IN_FLIGHT = 2
"""Steps whose metrics are left on the device, so that reading them never makes it wait."""
_LABELS = {
    "loss": "Loss",
    "l1": "L1",
    "l2": "L2",
    "charbonnier": "Charbonnier",
    "perceptual": "Perceptual",
    "quantizer": "Quantizer",
    "ssim_loss": "1 - SSIM",
    "ms_ssim_loss": "1 - MS-SSIM",
    "generator": "Generator",
    "discriminator": "Discriminator",
    "adversarial_weight": "Adversarial weight",
}
"""The parts of the loss in the line of an epoch, by their names in the logs."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended: ``evaluation`` of the best checkpoint on the test split, or None if stopped early."""

    step: int
    evaluation: evaluation.Evaluation | None


@dataclasses.dataclass
class Progress:
    """Where a run is: what a checkpoint holds beside the arrays.

    ``slices`` is the number of training slices (0 where a model was imported), ``sums`` are over the epoch so far;
    ``best_ssim`` is the validation split's highest so far.
    """

    epoch: int = 0
    steps_in_epoch: int = 0
    slices: int = 0
    loader: dict[str, Any] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    best_ssim: float = -1.0
    best_epoch: int = 0


@dataclasses.dataclass
class Clock:
    """Seconds an epoch's ``images`` took, and how many of them were spent waiting for input."""

    images: int = 0
    total: float = 1e-9
    waiting: float = 0.0


@distributed.explains_losses()
def train_and_evaluate(
    config: Config, run: Path, *, resume: bool = False, log: Callable[[str], None] = print
) -> Outcome:
    """Trains to ``config.training.epochs``, then evaluates the best checkpoint on the test split.

    SIGTERM or Ctrl-C finishes the step, saves and returns. Of several processes (see ``distributed``) each is
    given the same arguments; all stop after the same step if one is told to, and the first writes and logs.

    Args:
      config: the whole configuration; written to ``run``/config.json.
      run: the run's folder.
      resume: go on from the newest checkpoint in ``run``.
      log: is given lines for people.

    Raises:
      ConfigError: a setting cannot work, or ``run`` holds a run and ``resume`` is not set.
      DataError, WeightsError: the images or the VGG weights cannot be read.
      CheckpointError: a checkpoint cannot be written or read.
      DivergenceError: the loss is no longer finite; the last good checkpoint is left.
      PeerError: another process has ended or cannot be reached.
    """
    training.check_devices(config.training.batch_size, config.training.accumulate)
    _claim(run, resume)
    hip_mri.check_exists(config.data)  # before fetching weights, which may take a while
    with distributed.first_alone():
        vgg_params = training.load_vgg(config)
    trainer = Trainer(config, run, vgg_params, log if distributed.is_first() else _quiet)
    try:
        with trainer, _stop_signals() as received:
            stop = distributed.Stop(received)
            trainer.start(resume)
            if distributed.is_first():
                workdir.save_config(run, config)
            trainer.run(stop)
            if stop:
                return Outcome(trainer.step, None)
    except OSError as error:
        raise CheckpointError(
            f"--workdir {run}: cannot be written ({error}); free space and go on with --resume"
        ) from error
    return Outcome(trainer.step, evaluation.evaluate_run(run, log=_quiet))


def _claim(run: Path, resume: bool) -> None:
    with distributed.first_alone():
        if distributed.is_first():
            workdir.claim(run, resume)
        elif not run.is_dir():
            raise ConfigError(
                f"--workdir {run}: is not here, where process 0 made it; use a folder that all processes share"
            )


class Trainer:
    """Holds what a run needs while it trains; ``train_and_evaluate`` drives it."""

    def __init__(self, config: Config, run: Path, vgg_params: Any, log: Callable[[str], None]):
        self._config = config
        self._run = run
        self._log = log
        with distributed.first_alone():
            builder = hip_mri.prepare(config.data, config.model.image_size, log)
        train, validation = (
            loader.Slices(builder.as_data_source(split=split), config.data, config.model.image_size)
            for split in ("train", "validation")
        )
        self._loader = loader.TrainLoader(
            train,
            config.training.batch_size,
            config.training.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self._check_steps()
        self._schedule = training.learning_rate_schedule(config.training, self._loader.steps_per_epoch)
        self._validator = evaluation.Evaluator(config, validation)
        self._samples = np.linspace(0, len(validation) - 1, min(config.training.sample_images, len(validation)))
        self._vgg_params = training.replicate(vgg_params)
        self._state = training.create_train_state(config, self._loader.steps_per_epoch)
        self._train_step = training.make_train_step(config)
        self._progress = Progress(slices=len(train))
        self._slices = len(train)
        self._checkpoints = checkpoint.Checkpoints(run)
        self._metrics: logs.MetricsLog | None = None
        self._compiled = False
        self._describe(len(train), len(validation))

    @property
    def step(self) -> int:
        """Steps taken since the run began."""
        return int(self._state.step)

    def _check_steps(self) -> None:
        settings, loss = self._config.training, self._config.loss
        steps = settings.epochs * self._loader.steps_per_epoch
        if loss.adversarial_weight and loss.adversarial_start >= steps:
            raise ConfigError(
                f"--adversarial-start {loss.adversarial_start} is not below the {steps} steps of this training "
                f"({settings.epochs} epochs of {self._loader.steps_per_epoch}), so that no discriminator would join; "
                "start it earlier"
            )
        if settings.warmup_steps >= steps:
            raise ConfigError(
                f"--warmup-steps {settings.warmup_steps} is not below the {steps} steps of this training "
                f"({settings.epochs} epochs of {self._loader.steps_per_epoch}); warm up for a tenth of them, say"
            )

    def _describe(self, train: int, validation: int) -> None:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
        devices, processes = jax.devices(), jax.process_count()
        self._log(
            f"Preset {self._config.preset}: {parameters / 1e6:.2f} M parameters, {train} training and {validation} "
            f"validation slices, {len(devices)} x {devices[0].device_kind}"
            + (f" in {processes} processes" if processes > 1 else "")
        )
        loss = self._config.loss
        if self._state.adversary:
            size = sum(leaf.size for leaf in jax.tree.leaves(self._state.adversary.params))
            self._log(f"Discriminator: {size / 1e6:.2f} M parameters, joins after {loss.adversarial_start} steps")
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
            self._state, values = self._checkpoints.restore(self._state, "newest")
            self._progress = Progress(**values)
            self._check_slices()
            if self._progress.loader:  # empty where the model was imported
                self._loader.set_state(self._progress.loader)
            self._log(f"Resuming at step {self.step}, epoch {self._progress.epoch + 1}")
        self._state = training.replicate(self._state)
        if distributed.is_first():
            self._metrics = logs.MetricsLog(self._run, self.step)

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
        while self._progress.epoch < self._config.training.epochs and not self._stale() and not stop:
            clock = self._train_epoch(stop)
            if self._progress.steps_in_epoch < self._loader.steps_per_epoch:
                self._save(None)
                break
            self._finish_epoch(clock)
        self._checkpoints.wait()

    def _stale(self) -> bool:
        """Whether validation has not improved for so long that ``early_stopping`` ends the training."""
        patience, progress = self._config.training.early_stopping, self._progress
        stale = bool(patience) and progress.epoch - progress.best_epoch >= patience
        if stale:
            ago = progress.epoch - progress.best_epoch
            self._log(f"Stopped early: the best validation SSIM, {progress.best_ssim:.4f}, was {ago} epochs ago")
        return stale

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
                images = training.split_over_devices(next(self._loader))
                clock.waiting += time.perf_counter() - asked
                self._state, metrics = self._train_step(self._state, images, self._vgg_params)
                progress.steps_in_epoch += 1
                clock.images += self._config.training.batch_size
                in_flight.append((self._progress.epoch * steps + progress.steps_in_epoch, metrics))
                if not self._compiled:
                    jax.block_until_ready(metrics)
                    self._compiled = True
                    self._log(f"Compiled and ran the first step in {time.perf_counter() - asked:.1f} s")
                    begin, clock = time.perf_counter(), Clock()  # compiling says nothing of the speed
                if len(in_flight) > _STEPS_IN_FLIGHT:
                    self._collect(*in_flight.popleft(), bar)
                bar.update()
            for step, metrics in in_flight:
                self._collect(step, metrics, bar)
            clock.total = time.perf_counter() - begin
        progress.loader = self._loader.get_state()
        return clock

    def _collect(self, step: int, metrics: training.StepMetrics, bar: tqdm.tqdm) -> None:
        """Adds a finished step's scalars to the epoch's sums; raises DivergenceError if one is not finite."""
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
        if config.ms_ssim_weight:
            values["ms_ssim_loss"] = metrics.losses.ms_ssim
        if metrics.adversary:
            values["generator"] = metrics.adversary.generator
            values["discriminator"] = metrics.adversary.discriminator
            values["adversarial_weight"] = metrics.adversary.weight
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        if not all(map(math.isfinite, values.values())):
            raise DivergenceError(self._divergence(step, values))
        for name, value in values.items():
            self._progress.sums[name] = self._progress.sums.get(name, 0.0) + value
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def _divergence(self, step: int, values: dict[str, float]) -> str:
        found = ", ".join(f"{name} {value:g}" for name, value in values.items())
        try:
            self._checkpoints.wait()
            kept = f"the last good checkpoint is at step {self._checkpoints.step()}"
        except CheckpointError:
            kept = "no checkpoint was saved before it"
        return f"the loss is not finite at step {step} ({found}); {kept}; try a lower --learning-rate"

    def _finish_epoch(self, clock: Clock) -> None:
        progress, steps = self._progress, self._loader.steps_per_epoch
        means = {name: total / steps for name, total in progress.sums.items()}
        result = self._validator.run(self._state.evaluated)
        summary = result.summary()
        progress.epoch, progress.steps_in_epoch, progress.sums = progress.epoch + 1, 0, {}
        if summary["ssim"] > progress.best_ssim:
            progress.best_ssim, progress.best_epoch = summary["ssim"], progress.epoch
        speed = {"images_per_second": clock.images / clock.total, "input_wait": clock.waiting / clock.total}
        rate = {"learning_rate": float(self._schedule(self.step - 1))}
        if self._metrics:
            self._metrics.write(self.step, progress.epoch, "train", means | rate | speed)
            self._metrics.write(self.step, progress.epoch, "validation", summary)
        parts = ", ".join(f"{label}: {means[name]:.4f}" for name, label in _LABELS.items() if name in means)
        self._log(
            f"Epoch [{progress.epoch}/{self._config.training.epochs}], {parts}, "
            f"Val SSIM: {summary['ssim']:.4f}, Val PSNR: {summary['psnr']:.2f} dB, "
            f"{result.code_use()}, "
            f"{speed['images_per_second']:.1f} images/s, Input wait: {speed['input_wait']:.1%}"
        )
        if len(self._samples):
            chosen = [int(index) for index in self._samples]
            path = self._run / workdir.SAMPLES / f"epoch_{progress.epoch:04d}.png"
            labels = [f"slice {index + 1}" for index in chosen]
            self._validator.draw(self._state.evaluated, result, chosen, labels, path)
        self._save(summary["ssim"])

    def _save(self, ssim: float | None) -> None:
        self._checkpoints.save(self._state, dataclasses.asdict(self._progress), ssim)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
        if kind is None or not distributed.several():  # else it would wait for processes that may be gone
            self.close()

    def close(self) -> None:
        """Ends logs and checkpoint threads."""
        if self._metrics:
            self._metrics.close()
        self._checkpoints.close()


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
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
