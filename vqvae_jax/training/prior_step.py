"""One step of training and of evaluation of the prior, pmapped over this process's devices."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqvae_jax.config import ModelConfig, PriorConfig
from vqvae_jax.models.prior import PASSES, Prior, coding_order, init_prior
from vqvae_jax.models.vqvae import decoding_variables
from vqvae_jax.runtime import compilation
from vqvae_jax.runtime.randomness import Purpose, key_for
from vqvae_jax.training.state import TrainState, Variables
from vqvae_jax.training.step import AXIS, places, pmapped

METRIC = "share_saved"
"""1 - bits a code / log2 K on the validation split: what the best prior is chosen by."""
RANDOM_SHARE = 0.25
"""Share of the training masks that are random; the others are of the coding order."""
ALONE_SHARE = 0.2
"""Share of the training slices that are shown without the slices before; and of the rest, without the second."""
WARMUP_STEPS = 50
GRADIENT_CLIP = 1.0


@flax.struct.dataclass
class Grids:
    """Codes of slices, ``indices`` int32 [..., N, h, w], and of those before them.

    ``before`` is int32 [..., N, neighbours, h, w]; ``present`` bool [..., N, neighbours] says which there are.
    """

    indices: Any
    before: Any
    present: Any


def make_prior(config: PriorConfig, model: ModelConfig) -> Prior:
    """The prior of a run's codes, with the 8-bit numbers that coding computes with.

    Training with them from the first step is better than from a later one on: 6.51 bits a code after 355 steps,
    instead of 6.58 (docs/results.md).
    """
    return Prior(
        num_embeddings=model.num_embeddings,
        channels=config.channels,
        blocks=config.blocks,
        neighbours=config.neighbours,
        grid=model.latent_size,
        rounded=True,
    )


def learning_rate_schedule(config: PriorConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0, then a cosine to 0 at the last of ``steps``."""
    warmup = min(WARMUP_STEPS, steps // 2)
    falling = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup))
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), falling], [warmup])


def create_prior_state(config: PriorConfig, model: ModelConfig, codebook: jax.Array, steps: int) -> TrainState:
    """A fresh state for ``steps`` steps; the same for the same seed, on every process."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(GRADIENT_CLIP), optax.adam(learning_rate_schedule(config, steps), b2=0.99)
    )

    def init(key: jax.Array) -> tuple[Variables, Any]:
        variables = init_prior(make_prior(config, model), codebook, key)
        return variables["params"], optimizer.init(variables["params"])

    key = key_for(config.seed, Purpose.PRIOR_PARAMETERS)
    params, opt_state = jax.jit(init, compiler_options=compilation.QUICKLY)(key)
    step = jnp.zeros((), jnp.int32)
    return TrainState(step=step, apply_fn=None, params=params, model_state={}, tx=optimizer, opt_state=opt_state)


def codebook_of(variables: Variables) -> jax.Array:
    """The codebook [K, D] among a model's variables."""
    (codebook,) = (leaf for path, leaf in decoding_variables(variables).items() if path.endswith("/codebook"))
    return codebook


def draw_known(key: jax.Array, order: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Which codes of a grid are known, bool [h, w]: at random, or all before some pass of the coding order.

    A random share of all positions is known, or what comes before a pass. Passes are drawn by the square root of
    their sizes: the many codes of late ones are what bits are spent on, but all hang on the early ones.

    Returns:
      The mask; and weights float32 [h, w], 0 but for the codes of that pass. The expected sum of weights times bits
      is the mean bits a code, as the coder spends them.
    """
    sizes = np.bincount(order.ravel(), minlength=PASSES)
    shares = jnp.asarray(sizes**0.5 / (sizes**0.5).sum())
    kind, share, cells, number = jax.random.split(key, 4)
    at_random = jax.random.uniform(cells, order.shape) < jax.random.uniform(share)
    first = jax.random.choice(number, PASSES, p=shares)
    random = jax.random.bernoulli(kind, RANDOM_SHARE)
    weight = jnp.where(random, 0, 1 / (shares[first] * (1 - RANDOM_SHARE) * order.size))
    return jnp.where(random, at_random, order < first), weight * (order == first)


def draw_present(key: jax.Array, present: jax.Array) -> jax.Array:
    """Which of a slice's neighbours, bool [neighbours], are shown: all, only the nearest, or none."""
    shown = ~jax.random.bernoulli(key, ALONE_SHARE, present.shape)
    return present & (jnp.cumprod(shown) > 0)


def cross_entropy(logits: jax.Array, indices: jax.Array) -> jax.Array:
    """Nats of each code: float32 [N, h, w]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, indices)


def draw_masks(
    config: PriorConfig, step: jax.Array, present: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``draw_known`` and ``draw_present`` of each of this device's slices: [N, h, w], [N, h, w], [N, neighbours]."""
    key = key_for(config.seed, Purpose.MASKS, step)
    keys = jax.vmap(lambda place: jax.random.split(jax.random.fold_in(key, place)))(places(len(present)))
    known, weights = jax.vmap(lambda key: draw_known(key, coding_order(*size)))(keys[:, 0])
    return known, weights, jax.vmap(draw_present)(keys[:, 1], present)


def unknown_nats(logits: jax.Array, indices: jax.Array, known: jax.Array) -> jax.Array:
    """The prior's loss: the mean over slices of the mean nats of their unknown codes."""
    nats = jnp.where(known, 0, cross_entropy(logits, indices))
    unknown = jnp.maximum(jnp.sum(~known, axis=(1, 2)), 1)
    return jnp.mean(jnp.sum(nats, axis=(1, 2)) / unknown)


def make_prior_train_step(config: PriorConfig, model: ModelConfig) -> Callable[[TrainState, Grids], tuple]:
    """The pmapped step: (state, Grids [devices, B, ...]) -> (state, loss), where the loss is bits an unknown code.

    State and loss have no device axis.
    """
    prior = make_prior(config, model)

    def train_step(state, grids):
        known, _, present = draw_masks(config, state.step, grids.present, grids.indices.shape[1:])

        def loss_fn(params):
            logits = prior.apply({"params": params}, grids.indices, known, grids.before, present)
            return unknown_nats(logits, grids.indices, known)

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        loss, gradients = jax.lax.pmean((loss, gradients), AXIS)
        return state.apply_gradients(grads=gradients), loss / jnp.log(2.0)

    return pmapped(train_step, (None, 0), (None, None), donate=(0,))


def make_prior_eval_step(config: PriorConfig, model: ModelConfig) -> Callable[[Variables, Grids, Any], jax.Array]:
    """The pmapped evaluation of one pass: (variables, Grids [devices, B, ...], pass number) -> bits [devices, B].

    The sum over the pass's codes, given all passes before.
    """
    prior = make_prior(config, model)

    def eval_step(variables, grids, number):
        order = coding_order(*grids.indices.shape[1:])
        known = jnp.broadcast_to(order < number, grids.indices.shape)
        logits = prior.apply(variables, grids.indices, known, grids.before, grids.present)
        nats = jnp.where(order == number, cross_entropy(logits, grids.indices), 0)
        return jnp.sum(nats, axis=(1, 2)) / jnp.log(2.0)

    return pmapped(eval_step, (None, 0, None), 0)
