"""What training moves: parameters, the optimizer's state, and what the model keeps beside its parameters."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from vqvae_jax.config import Config, ModelConfig
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime import compilation
from vqvae_jax.runtime.randomness import Purpose, key_for

DECAY, DECAY_EPOCHS = 0.5, 20
"""The published schedule: factor on the learning rate, and epochs between two."""
Variables = Any
"""What a model's ``apply`` takes: ``params``, ``batch_stats`` and, with an EMA codebook, ``ema``."""


class TrainState(train_state.TrainState):
    """Parameters, optimizer state and step, with the model's other collections in ``model_state``.

    ``step`` counts calls of the training step: with ``accumulate``, several for one move of the parameters.
    """

    model_state: Any

    @property
    def variables(self) -> Variables:
        """What the model's ``apply`` takes."""
        return {"params": self.params, **self.model_state}

    @property
    def beyond_model(self) -> dict[str, Any]:
        """What training needs beside ``variables``."""
        return {"opt_state": self.opt_state, "step": self.step}

    def restored(self, variables: Variables, beyond_model: dict[str, Any]) -> "TrainState":
        """This state with other ``variables`` and ``beyond_model``."""
        model_state = dict(variables)
        return self.replace(params=model_state.pop("params"), model_state=model_state, **beyond_model)


@flax.struct.dataclass
class RateState:
    """The states of a model and of the prior over its codes, which are trained together. Used as the model's own."""

    model: TrainState
    prior: TrainState

    @property
    def step(self) -> jax.Array:
        """The model's step."""
        return self.model.step

    @property
    def params(self) -> Any:
        """The model's parameters."""
        return self.model.params

    @property
    def variables(self) -> Variables:
        """What the model's ``apply`` takes."""
        return self.model.variables

    @property
    def beyond_model(self) -> dict[str, Any]:
        """What training needs beside ``variables``: the prior's parameters too."""
        return {"model": self.model.beyond_model, "prior": {"params": self.prior.params, **self.prior.beyond_model}}

    def restored(self, variables: Variables, beyond_model: dict[str, Any]) -> "RateState":
        """This state with other ``variables`` and ``beyond_model``."""
        model = self.model.restored(variables, beyond_model["model"])
        return RateState(model, self.prior.replace(**beyond_model["prior"]))


def learning_rate_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 for ``warmup_steps``, then falling in steps or as a cosine.

    In steps: multiplied by DECAY after every DECAY_EPOCHS epochs from then on. As a cosine: to
    0 at the last step (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts).
    """
    rate, settings = config.learning_rate, config.training
    warmup = settings.warmup_steps
    if settings.schedule == "cosine":
        falling = optax.cosine_decay_schedule(rate, max(1, settings.epochs * steps_per_epoch - warmup))
    else:
        falling = optax.exponential_decay(
            rate,
            transition_steps=DECAY_EPOCHS * steps_per_epoch,
            decay_rate=DECAY,
            staircase=True,
        )
    if not warmup:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), falling], [warmup])


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) on gradients clipped to a global norm.

    With ``accumulate`` it moves the parameters once for so many gradients, by their mean.
    """
    optimizer = optax.adam(learning_rate_schedule(config, steps_per_epoch))
    settings = config.training
    if settings.gradient_clip:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.gradient_clip), optimizer)
    if settings.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, settings.accumulate).gradient_transformation()
    return optimizer


def init_variables(config: ModelConfig, key: jax.Array) -> Variables:
    """Fresh variables of a model; under ``jax.eval_shape``, their shapes."""
    return VQVAE(config).init(key, jnp.zeros((1, *config.image_size, 1), jnp.float32))


def create_train_state(config: Config, steps_per_epoch: int) -> TrainState:
    """A fresh state; the same for the same seed, on every process."""
    optimizer = make_optimizer(config, steps_per_epoch)

    def init(key: jax.Array) -> tuple[Variables, Any]:
        variables = init_variables(config.model, key)
        return variables, optimizer.init(variables["params"])

    key = key_for(config.training.seed, Purpose.PARAMETERS)
    variables, opt_state = jax.jit(init, compiler_options=compilation.QUICKLY)(key)
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        apply_fn=None,
        params=params,
        model_state=variables,
        tx=optimizer,
        opt_state=opt_state,
    )
