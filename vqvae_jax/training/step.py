"""One step of training and of evaluation, pmapped over this process's devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vqvae_jax.config import AugmentationConfig, Config, LossConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.metrics.similarity import SSIM_WINDOW, ssim
from vqvae_jax.models.batch_norm import STATISTICS
from vqvae_jax.models.layers import BLOCK, EXPENSIVE
from vqvae_jax.models.quantizer import CHOICE, EMA
from vqvae_jax.models.vgg16 import VGG16
from vqvae_jax.models.vqvae import VQVAE, VQVAEOutput
from vqvae_jax.runtime import compilation, distributed
from vqvae_jax.runtime.randomness import Purpose, key_for
from vqvae_jax.training.augmentation import augment
from vqvae_jax.training.losses import RECONSTRUCTION, Losses, perceptual_loss
from vqvae_jax.training.state import TrainState, Variables

AXIS = "batch"
"""Name of the device axis, over which gradients, batch statistics and code counts are reduced."""

KEPT = {"cheap": (EXPENSIVE, STATISTICS, CHOICE), "full": (BLOCK, STATISTICS, CHOICE)}
"""``remat`` -> names of the values that the backward pass finds in memory; of "none", all."""


@flax.struct.dataclass
class StepMetrics:
    """Scalars of one training step, means over the global batch, and code ``counts`` [K]."""

    losses: Losses
    gradient_norm: jax.Array
    counts: jax.Array


@flax.struct.dataclass
class EvalOutput:
    """``reconstruction`` [..., H, W, 1], ``indices`` [..., h, w], and the ``counts`` [K] of unpadded images' codes."""

    reconstruction: jax.Array
    indices: jax.Array
    counts: jax.Array


def make_train_step(config: Config) -> Callable[[TrainState, jax.Array, Variables | None], tuple]:
    """The pmapped step: (state, images [devices, B, H, W, 1], VGG16's variables) -> (state, StepMetrics).

    State, variables and metrics have no device axis: they are the same on every device. The old state's buffers are
    reused for the new one. With ``remat`` "auto" nothing is computed again; ``fitted_train_step`` is who decides.

    Raises:
      ConfigError: an SSIM term of images below its window.
    """
    check_ssim(config)
    model = VQVAE(config.model, axis_name=AXIS)
    vgg = VGG16(layers=config.loss.perceptual_layers, dtype=jnp.dtype(config.model.precision))

    def train_step(state, images, vgg_variables):
        if config.augmentation != AugmentationConfig():
            key = key_for(config.training.seed, Purpose.AUGMENTATION, state.step)
            images = augment(key, images, config.augmentation, places(len(images)))

        def forward(params, images):
            return model.apply(
                {"params": params, **state.model_state},
                images,
                train=True,
                mutable=list(state.model_state),
                rngs={EMA: key_for(config.training.seed, Purpose.CODEBOOK, state.step)},
            )

        def loss_fn(params):
            output, model_state = recomputing(forward, config.training.remat)(params, images)
            losses = losses_of(config.loss, vgg, vgg_variables, output, images)
            return losses.total, (losses, output.quantizer.counts, model_state)

        gradients, (losses, counts, model_state) = jax.grad(loss_fn, has_aux=True)(state.params)
        gradients, losses = jax.lax.pmean((gradients, losses), AXIS)
        counts = jax.lax.psum(counts, AXIS)
        state = state.apply_gradients(grads=gradients, model_state=model_state)
        return state, StepMetrics(losses, optax.tree.norm(gradients), counts)

    return pmapped(train_step, (None, 0, None), (None, None), donate=(0,))


def losses_of(
    config: LossConfig, vgg: VGG16, vgg_variables: Variables | None, output: VQVAEOutput, images: jax.Array
) -> Losses:
    """The losses of what the model made of images [N, H, W, 1]; ``rate`` is 0."""
    reconstruction = output.reconstruction
    difference = RECONSTRUCTION[config.reconstruction](reconstruction, images)
    quantizer = output.quantizer.loss
    perceptual = dissimilarity = jnp.float32(0)
    if config.perceptual_weight:
        target = jax.lax.stop_gradient(vgg.apply(vgg_variables, images))
        perceptual = perceptual_loss(vgg.apply(vgg_variables, reconstruction), target)
    if config.ssim_weight:
        dissimilarity = 1 - jnp.mean(ssim(reconstruction, images))
    total = difference + config.perceptual_weight * perceptual + quantizer + config.ssim_weight * dissimilarity
    return Losses(total, difference, perceptual, quantizer, dissimilarity, jnp.float32(0))


def fitted_train_step(make: Callable[[Config], Callable], config: Config, *arguments: Any) -> tuple[Callable, str]:
    """A step, such as ``make_train_step`` makes, compiled for its arguments; and the ``remat`` with which it fits.

    Of several processes, all take the first one's ``remat``.
    """
    wanted = config.training.remat
    if wanted != "auto" and jax.process_count() > 1:
        return make(config), wanted
    choices = ("none", *KEPT) if wanted == "auto" else (wanted,)
    for remat in choices:
        step = make(_with_remat(config, remat))
        program = compilation.ahead(step, arguments)
        if compilation.bytes_needed(program) <= compilation.bytes_there():
            break
    if jax.process_count() == 1:
        return program, remat
    remat = distributed.shared(remat)
    return make(_with_remat(config, remat)), remat


def make_eval_step(config: Config) -> Callable[[Variables, jax.Array, jax.Array], EvalOutput]:
    """The pmapped evaluation: (variables, images [devices, B, H, W, 1], mask [devices, B]) -> EvalOutput.

    Running statistics stand in for batch statistics. Reconstruction and indices keep the device axis. The counts are
    summed over devices and leave padded images (mask 0) out.
    """
    model = VQVAE(config.model, axis_name=AXIS)

    def eval_step(variables, images, mask):
        output = model.apply(variables, images, train=False)
        indices = output.quantizer.indices
        weights = jnp.broadcast_to(mask[:, None, None], indices.shape)
        counts = jnp.zeros(config.model.num_embeddings, jnp.float32).at[indices].add(weights)
        return output.reconstruction, indices, jax.lax.psum(counts, AXIS)

    program = pmapped(eval_step, (None, 0, 0), (0, 0, None))
    return lambda variables, images, mask: EvalOutput(*program(variables, images, mask))


def check_devices(batch_size: int, accumulate: int = 1) -> None:
    """Raises ConfigError where a global batch, or a part of it, does not divide over all devices."""
    devices = jax.device_count()
    unit = devices * accumulate
    if batch_size % unit:
        parts = f" in {accumulate} parts (--accumulate)" if accumulate > 1 else ""
        raise ConfigError(
            f"--batch-size {batch_size}{parts} does not divide over {devices} devices; "
            f"use a multiple of {unit}, such as {-(-batch_size // unit) * unit}"
        )


def replicate(tree: Any) -> Any:
    """Copies a tree of arrays to this process's devices, without a device axis: as the steps take and return it."""
    mesh = jax.sharding.Mesh(jax.local_devices(), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def split_over_devices(array: Any) -> Any:
    """[B, ...] to [devices, B / devices, ...] for this process's devices, which must divide B."""
    devices = jax.local_device_count()
    return array.reshape(devices, array.shape[0] // devices, *array.shape[1:])


def _with_remat(config: Config, remat: str) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, remat=remat))


def recomputing(function: Callable, kept: str) -> Callable:
    """Wraps ``function`` so that the backward pass keeps only the values that ``remat`` names.

    It computes the rest again.
    """
    if kept not in KEPT:
        return function
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(*KEPT[kept]))


def places(count: int) -> jax.Array:
    """Where this device's ``count`` images are in the whole batch, which ``loader.TrainLoader`` deals to processes."""
    process, device = jnp.divmod(jax.lax.axis_index(AXIS), jax.local_device_count())
    return (device * count + jnp.arange(count)) * jax.process_count() + process


def pmapped(function: Callable, in_axes: tuple, out_axes: Any, donate: tuple[int, ...] = ()) -> Callable:
    """``jax.pmap``, compiled with our options where one process runs alone: a pmap of several cannot be jitted."""
    program = jax.pmap(function, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate)
    return program if jax.process_count() > 1 else compilation.jit(program, donate)


def check_ssim(config: Config) -> None:
    """Raises ConfigError for an SSIM term of images below its window."""
    if config.loss.ssim_weight and min(config.model.image_size) < SSIM_WINDOW:
        raise ConfigError(
            f"--ssim-weight with --image-size {' '.join(map(str, config.model.image_size))}: expected at least "
            f"{SSIM_WINDOW} pixels a side, the window of SSIM; take larger images or weight 0"
        )
