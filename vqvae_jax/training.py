"""One step of training and of evaluation, pmapped over this process's devices."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from vqvae_jax import losses
from vqvae_jax.config import Config, TrainingConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.models import vgg16, vgg_weights
from vqvae_jax.models.quantizer import CODEBOOK
from vqvae_jax.models.vqvae import VQVAE

AXIS = "batch"
"""Name of the device axis, over which gradients, batch statistics and code counts are reduced."""

Variables = Any
VggParams = Any


class TrainState(train_state.TrainState):
    """Parameters, optimizer state and step, with what the model keeps beside its parameters.

    ``model_state`` has the collection ``batch_stats`` (batch norm's running statistics) and, with an EMA
    codebook, ``codebook``.
    """

    model_state: Any

    @property
    def variables(self) -> Variables:
        """What the model's ``apply`` takes."""
        return {"params": self.params, **self.model_state}


@flax.struct.dataclass
class StepMetrics:
    """Scalars of one training step, means over the global batch, and code ``counts`` [K]."""

    losses: losses.Losses
    gradient_norm: jax.Array
    counts: jax.Array


@flax.struct.dataclass
class EvalOutput:
    """``reconstruction`` [B, H, W, 1], ``indices`` [B, h, w], and the counts [K] of unpadded images' codes."""

    reconstruction: jax.Array
    indices: jax.Array
    counts: jax.Array


def learning_rate_schedule(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: multiplied by ``learning_rate_decay`` after every ``decay_epochs`` epochs."""
    return optax.exponential_decay(
        config.learning_rate,
        transition_steps=config.decay_epochs * steps_per_epoch,
        decay_rate=config.learning_rate_decay,
        staircase=True,
    )


def make_optimizer(config: TrainingConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) on gradients clipped to a global norm."""
    adam = optax.adam(learning_rate_schedule(config, steps_per_epoch))
    if not config.gradient_clip:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), adam)


def create_train_state(config: Config, steps_per_epoch: int) -> TrainState:
    """A fresh state; the same for the same seed, on every process."""
    model = VQVAE(config.model, axis_name=AXIS)
    image = jnp.zeros((1, *config.model.image_size, 1))
    variables = jax.jit(VQVAE(config.model).init)(jax.random.key(config.training.seed), image)
    params = variables.pop("params")
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        model_state=variables,
        tx=make_optimizer(config.training, steps_per_epoch),
    )
    return state.replace(step=jnp.zeros((), jnp.int32))


def load_vgg(config: Config) -> VggParams | None:
    """VGG16's variables down to the perceptual layer, or None where the perceptual weight is 0."""
    if not config.loss.perceptual_weight:
        return None
    return vgg_weights.load(config.loss.vgg_weights, config.loss.perceptual_layer)


def make_loss(config: Config) -> Callable[[Any, TrainState, jax.Array, VggParams | None], tuple]:
    """The training loss on one device: (parameters, state, images [B, H, W, 1], VGG parameters) ->
    (total, (Losses, code counts [K], new model state)). Batch statistics are taken over the axis ``AXIS``.
    """
    vgg = vgg16.VGG16(layers=(config.loss.perceptual_layer,), dtype=jnp.dtype(config.model.precision))

    def loss_fn(params, state, images, vgg_params):
        output, model_state = state.apply_fn(
            {"params": params, **state.model_state},
            images,
            train=True,
            mutable=list(state.model_state),
            rngs={CODEBOOK: jax.random.fold_in(jax.random.key(config.training.seed), state.step)},
        )
        perceptual = jnp.float32(0)
        if vgg_params is not None:
            perceptual = losses.perceptual_loss(
                vgg.apply(vgg_params, output.reconstruction),
                jax.lax.stop_gradient(vgg.apply(vgg_params, images)),
            )
        parts = losses.total_loss(
            losses.reconstruction_loss(output.reconstruction, images),
            perceptual,
            output.quantizer.loss,
            config.loss.perceptual_weight,
        )
        return parts.total, (parts, output.quantizer.counts, model_state)

    return loss_fn


def make_train_step(config: Config) -> Callable[[TrainState, jax.Array, VggParams | None], tuple]:
    """The pmapped step: (state, images [devices, B, H, W, 1], VGG parameters) -> (state, StepMetrics).

    State, parameters and metrics have no device axis: they are the same on every device. The old state's
    buffers are reused for the new one.
    """
    loss_fn = make_loss(config)

    def train_step(state, images, vgg_params):
        gradients, (parts, counts, model_state) = jax.grad(loss_fn, has_aux=True)(
            state.params, state, images, vgg_params
        )
        gradients, parts = jax.lax.pmean((gradients, parts), AXIS)
        metrics = StepMetrics(parts, optax.tree.norm(gradients), jax.lax.psum(counts, AXIS))
        return state.apply_gradients(grads=gradients, model_state=model_state), metrics

    return jax.pmap(train_step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=(None, None), donate_argnums=(0,))


def make_eval_step(config: Config) -> Callable[[Variables, jax.Array, jax.Array], EvalOutput]:
    """The pmapped evaluation: (variables, images [devices, B, H, W, 1], mask [devices, B]) -> EvalOutput.

    Running statistics stand in for batch statistics. The output's reconstruction and indices keep the
    device axis; its counts are summed over devices and leave padded images (mask 0) out.
    """
    model = VQVAE(config.model, axis_name=AXIS)

    def eval_step(variables, images, mask):
        output = model.apply(variables, images, train=False)
        indices = output.quantizer.indices
        weights = jnp.broadcast_to(mask[:, None, None], indices.shape).reshape(-1)
        counts = jnp.zeros(config.model.num_embeddings).at[indices.reshape(-1)].add(weights)
        return output.reconstruction, indices, jax.lax.psum(counts, AXIS)

    pmapped = jax.pmap(eval_step, axis_name=AXIS, in_axes=(None, 0, 0), out_axes=(0, 0, None))
    return lambda variables, images, mask: EvalOutput(*pmapped(variables, images, mask))


def check_devices(batch_size: int) -> None:
    """Raises ConfigError where a global batch does not divide over all devices."""
    devices = jax.device_count()
    if batch_size % devices:
        raise ConfigError(
            f"--batch-size {batch_size} does not divide over {devices} devices; "
            f"use a multiple of {devices}, such as {-(-batch_size // devices) * devices}"
        )


def replicate(tree: Any) -> Any:
    """Copies a tree of arrays to this process's devices, without a device axis: as the steps take and return it."""
    mesh = jax.sharding.Mesh(jax.local_devices(), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def split_over_devices(array: Any) -> Any:
    """[B, ...] to [devices, B / devices, ...] for this process's devices, which must divide B."""
    devices = jax.local_device_count()
    return array.reshape(devices, array.shape[0] // devices, *array.shape[1:])
