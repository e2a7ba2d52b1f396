"""Starting from another run: from its weights, and with a rate weight from the prior over its codes too."""

import dataclasses
import shutil
from pathlib import Path

import jax

from vqvae_jax.config import Config, ModelConfig, PriorConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.models.fingerprint import fingerprint
from vqvae_jax.models.prior import nearest_of
from vqvae_jax.runtime import distributed, runs
from vqvae_jax.training.checkpoint import Checkpoints, Progress, load_variables
from vqvae_jax.training.prior_step import METRIC, codebook_of, create_prior_state, make_prior
from vqvae_jax.training.state import RateState, TrainState, Variables

PRIOR_SLOWDOWN = 0.25
"""The prior's learning rate beside the model, as a share of that it was trained with alone."""


def check(config: Config) -> None:
    """Raises ConfigError where a training cannot start as its ``from_run`` and ``rate_weight`` say."""
    source = config.training.from_run
    if config.loss.rate_weight:
        if source is None:
            raise ConfigError("--rate-weight: needs --from RUN, a run with a prior over its codes")
        if config.training.accumulate > 1:
            raise ConfigError("--rate-weight: does not go with --accumulate; use --remat to save memory")
        if config.model.precision != "float32":
            raise ConfigError("--rate-weight: codes are chosen too finely for bfloat16; add --precision float32")
    if source is None:
        return
    found = runs.load_config(Path(source)).model
    free = ("precision", "image_size")
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config.model, field.name), getattr(found, field.name)
        if ours != theirs and field.name not in free:
            flag = field.name.replace("_", "-")
            raise ConfigError(f"--{flag} {ours}: the model of --from {source} has {theirs}; leave the flag out")


def prior_config(config: Config) -> PriorConfig:
    """The configuration of the prior that is trained along.

    Raises:
      ConfigError: ``from_run`` has no prior, or one over other codes than those of its best checkpoint.
    """
    source = Path(config.training.from_run)
    if not (source / runs.PRIOR / runs.CONFIG).exists():
        raise ConfigError(
            f"--rate-weight: {source} has no prior over its codes; run scripts/train_prior.py --workdir {source}"
        )
    found = runs.load_prior_config(source)
    run = runs.load_config(source)
    if found.model != fingerprint(run, load_variables(source, run)):
        raise ConfigError(
            f"--rate-weight: the prior in {source} is of another checkpoint; remove {source / runs.PRIOR} and run "
            "scripts/train_prior.py again"
        )
    return dataclasses.replace(found, epochs=config.training.epochs, learning_rate=PRIOR_SLOWDOWN * found.learning_rate)


def started(config: Config, state: TrainState) -> TrainState:
    """A fresh state with the variables of ``from_run``'s best checkpoint."""
    source = Path(config.training.from_run)
    variables = dict(load_variables(source, runs.load_config(source)))
    return state.replace(params=variables.pop("params"), model_state=variables)


def beside_prior(config: Config, prior: PriorConfig, state: TrainState, steps: int) -> RateState:
    """A model's state with a fresh one of a prior, for ``steps`` steps."""
    return RateState(state, create_prior_state(prior, config.model, codebook_of(state.variables), steps))


def with_prior(config: Config, prior: PriorConfig, state: RateState) -> RateState:
    """The state with the parameters of ``from_run``'s best prior."""
    return RateState(state.model, state.prior.replace(params=prior_params(config, prior)))


def has_prior_like(config: Config, prior: PriorConfig) -> bool:
    """Whether ``from_run`` is there and has a prior of the same shape."""
    source = config.training.from_run
    if source is None or not (Path(source) / runs.PRIOR / runs.CONFIG).exists():
        return False
    found = runs.load_prior_config(Path(source))
    return all(getattr(found, name) == getattr(prior, name) for name in ("channels", "blocks", "neighbours"))


def prior_params(config: Config, prior: PriorConfig) -> Variables:
    """The parameters of ``from_run``'s best prior.

    Where that was for another image size, each row and column starts as the prior takes it at ours: the nearest one.
    """
    source = Path(config.training.from_run)
    learned = runs.load_config(source).model
    checkpoints = Checkpoints(source / runs.PRIOR, METRIC, read_only=True)
    try:
        params = dict(checkpoints.restore_variables(make_prior(prior, learned).shapes(), "best")["params"])
    finally:
        checkpoints.close()
    for name, ours, theirs in zip(("rows", "columns"), config.model.latent_size, learned.latent_size, strict=True):
        params[name] = params[name][nearest_of(ours, theirs)]
    return params


def save_config(run_dir: Path, prior: PriorConfig) -> None:
    """Writes the configuration of a run's prior before it is trained, as that of no model's codes yet."""
    (run_dir / runs.PRIOR).mkdir(exist_ok=True)
    runs.save_config(run_dir / runs.PRIOR, dataclasses.replace(prior, model=""))


def save_prior(run_dir: Path, config: Config, state: RateState, progress: Progress, share_saved: float) -> None:
    """Writes the prior of a finished run, as one that scripts/train_prior.py trained; not where it is there already."""
    folder = run_dir / runs.PRIOR
    prior = runs.load_prior_config(run_dir)
    model = fingerprint(config, jax.device_get(state.variables))
    if prior.model == model:
        return
    prior = dataclasses.replace(prior, model=model)
    with distributed.first_alone():
        if distributed.is_first():
            shutil.rmtree(folder / runs.CHECKPOINTS, ignore_errors=True)
    checkpoints = Checkpoints(folder, METRIC)
    try:
        checkpoints.save(state.prior, Progress(progress.epoch, slices=progress.slices, score=share_saved), share_saved)
        checkpoints.wait()
    finally:
        checkpoints.close()
    if distributed.is_first():
        runs.save_config(folder, prior)
