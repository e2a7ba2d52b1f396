"""One step of training and of evaluation, pmapped over this process's devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from vqvae_jax import adversarial, augmentation, compilation, losses
from vqvae_jax.config import AugmentationConfig, Config, TrainingConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.models import vgg16, vgg_weights
from vqvae_jax.models.layers import BLOCK, EXPENSIVE
from vqvae_jax.models.quantizer import CHOICE, CODEBOOK
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.similarity import SSIM_WINDOW

AXIS = "batch"
"""Name of the device axis, over which gradients, batch statistics and code counts are reduced."""

AUGMENTATION = 1
"""Sets the random draws of augmentation apart from the codebook's, by the same seed."""
KEPT = {"cheap": (EXPENSIVE, CHOICE), "full": (BLOCK, CHOICE)}
"""``remat`` -> names of what the gradient finds in memory; it computes the rest of the model again."""

Variables = Any
VggParams = Any


class TrainState(train_state.TrainState):
    """Parameters, optimizer state and step, with what the model keeps beside its parameters.

    ``model_state`` has the collection ``batch_stats`` (batch norm's running statistics; group norm has none) and,
    with an EMA codebook, ``codebook``; it may be empty. ``average`` holds moving averages of ``params`` and, where
    there are any, ``batch_stats``; or nothing. ``adversary`` is a discriminator's own state, or nothing.
    """

    model_state: Any
    average: Any = None
    adversary: train_state.TrainState | None = None

    @property
    def variables(self) -> Variables:
        """What the model's ``apply`` takes to go on training."""
        return {"params": self.params, **self.model_state}

    @property
    def evaluated(self) -> Variables:
        """What it takes to be evaluated and used: the averages where there are any."""
        return self.variables | (self.average or {})


@flax.struct.dataclass
class StepMetrics:
    """Scalars of one training step, means over the global batch, and code ``counts`` [levels, K]."""

    losses: losses.Losses
    gradient_norm: jax.Array
    counts: jax.Array
    adversary: adversarial.AdversaryMetrics | None = None


@flax.struct.dataclass
class EvalOutput:
    """``reconstruction`` [B, H, W, 1], each level's ``indices`` [B, h, w], and the counts [levels, K] of unpadded
    images' codes; the finest level first.
    """

    reconstruction: jax.Array
    indices: tuple[jax.Array, ...]
    counts: jax.Array


def learning_rate_schedule(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 for ``warmup_steps``, then falling in steps or as a cosine.

    In steps: multiplied by ``learning_rate_decay`` after every ``decay_epochs`` epochs from then on. As a cosine: to
    0 at the last step (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts).
    """
    warmup = config.warmup_steps
    if config.schedule == "cosine":
        falling = optax.cosine_decay_schedule(config.learning_rate, max(1, config.epochs * steps_per_epoch - warmup))
    else:
        falling = optax.exponential_decay(
            config.learning_rate,
            transition_steps=config.decay_epochs * steps_per_epoch,
            decay_rate=config.learning_rate_decay,
            staircase=True,
        )
    if not warmup:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), falling], [warmup])


def make_optimizer(config: TrainingConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) on gradients clipped to a global norm.

    With ``weight_decay``, AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on kernels alone: biases, norms and
    codes do not decay.
    """
    schedule = learning_rate_schedule(config, steps_per_epoch)
    if config.weight_decay:
        adam = optax.adamw(schedule, weight_decay=config.weight_decay, mask=_kernels)
    else:
        adam = optax.adam(schedule)
    if not config.gradient_clip:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.gradient_clip), adam)


def _kernels(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def create_train_state(config: Config, steps_per_epoch: int) -> TrainState:
    """A fresh state; the same for the same seed, on every process."""
    model = VQVAE(config.model, axis_name=AXIS)
    optimizer = make_optimizer(config.training, steps_per_epoch)

    def init(key: jax.Array) -> tuple[Variables, Any]:
        variables = VQVAE(config.model).init(key, jnp.zeros((1, *config.model.image_size, 1)))
        return variables, optimizer.init(variables["params"])

    key = jax.random.key(config.training.seed)
    options = None if isinstance(key, jax.core.Tracer) else compilation.QUICKLY  # asked for shapes alone
    variables, opt_state = jax.jit(init, compiler_options=options)(key)
    params = variables.pop("params")
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        apply_fn=model.apply,
        params=params,
        model_state=variables,
        tx=optimizer,
        opt_state=opt_state,
        adversary=adversarial.create(config, learning_rate_schedule(config.training, steps_per_epoch)),
    )
    return state.replace(average=_averaged(state)) if config.training.average_decay else state


def _averaged(state: TrainState) -> Any:
    """What ``average`` averages. The EMA codebook is left out: its codes are averages already."""
    averaged = {name: state.variables[name] for name in ("params", "batch_stats") if name in state.variables}
    return jax.tree.map(jnp.copy, averaged)


def load_vgg(config: Config) -> VggParams | None:
    """VGG16's variables down to the deepest perceptual layer, or None where the perceptual weight is 0."""
    if not config.loss.perceptual_weight:
        return None
    return vgg_weights.load(config.loss.vgg_weights, *config.loss.perceptual_layers)


def make_loss(config: Config) -> Callable[[Any, TrainState, jax.Array, VggParams | None], tuple]:
    """The training loss on one device, without an adversary: (parameters, state, images [B, H, W, 1], VGG parameters)
    -> (total, (Losses, code counts [levels, K], new model state)). Batch statistics are taken over the axis ``AXIS``.
    """
    forward, compare = _make_forward(config), _make_compare(config)

    def loss_fn(params, state, images, vgg_params):
        output, model_state = forward(params, state, images)
        parts = compare(output.reconstruction, output.quantizer.loss, images, vgg_params)
        return parts.total, (parts, output.counts, model_state)

    return loss_fn


def _make_forward(config: Config) -> Callable:
    """The model in training: (parameters, state, images) -> (VQVAEOutput, new model state)."""

    def forward(params, state, images):
        def apply(params, images):
            return state.apply_fn(
                {"params": params, **state.model_state},
                images,
                train=True,
                mutable=list(state.model_state),
                rngs={CODEBOOK: jax.random.fold_in(jax.random.key(config.training.seed), state.step)},
            )

        return _remat(config, apply)(params, images)

    return forward


def _remat(config: Config, function: Callable) -> Callable:
    """``function``, of whose values its gradient finds those in memory that ``remat`` keeps."""
    if config.training.remat not in KEPT:
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT[config.training.remat])
    return jax.checkpoint(function, policy=policy)


def _make_compare(config: Config) -> Callable:
    """The losses of a reconstruction: (reconstruction, quantizer's loss, images, VGG parameters) -> Losses."""
    _check_similarity(config)
    vgg = vgg16.VGG16(layers=config.loss.perceptual_layers, dtype=jnp.dtype(config.model.precision))

    def compare(reconstruction, quantizer, images, vgg_params):
        perceptual = jnp.float32(0)
        if vgg_params is not None:
            perceptual = losses.perceptual_loss(
                vgg.apply(vgg_params, reconstruction),
                jax.lax.stop_gradient(vgg.apply(vgg_params, images)),
            )
        return losses.total_loss(config.loss, reconstruction, images, quantizer, perceptual)

    return compare


def _make_gradient(config: Config) -> Callable:
    """What `adversarial.make_gradient` returns, with None for the discriminator's where there is none."""
    if config.loss.adversarial_weight:
        remat = functools.partial(_remat, config)
        return adversarial.make_gradient(config, _make_forward(config), _make_compare(config), remat, AXIS)
    differentiate = jax.grad(make_loss(config), has_aux=True)

    def gradient(params, state, images, vgg_params):
        gradients, (parts, counts, model_state) = differentiate(params, state, images, vgg_params)
        return (gradients, None), (parts, None), counts, model_state

    return gradient


def _check_similarity(config: Config) -> None:
    side = min(config.model.image_size)
    for name in ("ssim_weight", "ms_ssim_weight"):
        if getattr(config.loss, name) and side < SSIM_WINDOW:
            raise ConfigError(
                f"--{name.replace('_', '-')} with --image-size {' '.join(map(str, config.model.image_size))}: "
                f"expected at least {SSIM_WINDOW} pixels a side, the window of SSIM; take larger images or weight 0"
            )


def make_train_step(config: Config) -> Callable[[TrainState, jax.Array, VggParams | None], tuple]:
    """The pmapped step: (state, images [devices, B, H, W, 1], VGG parameters) -> (state, StepMetrics).

    State, parameters and metrics have no device axis: they are the same on every device. The old state's
    buffers are reused for the new one. With ``accumulate``, B is cut into that many parts, whose gradients are
    averaged; the model's other state (running statistics, EMA codebook) moves with each part.
    """
    gradient = _make_gradient(config)

    def backward(state, images, vgg_params, part=0):
        if config.augmentation != AugmentationConfig():
            key = jax.random.key(config.training.seed)
            for number in (AUGMENTATION, state.step, part):
                key = jax.random.fold_in(key, number)
            images = augmentation.augment(key, images, config.augmentation, _places(len(images)))
        gradients, loss, counts, model_state = gradient(state.params, state, images, vgg_params)
        return state.replace(model_state=model_state), (gradients, loss, counts)

    def finish(state, found):
        gradients, loss, counts = found
        (gradients, adversary_gradients), (loss, adversary) = jax.lax.pmean((gradients, loss), AXIS)
        metrics = StepMetrics(loss, optax.tree.norm(gradients), jax.lax.psum(counts, AXIS), adversary)
        if state.adversary:
            state = state.replace(adversary=adversarial.update(config, state, adversary_gradients))
        state = state.apply_gradients(grads=gradients)
        if config.training.average_decay:
            # Young averages follow the weights closely, or they would long remember the random start.
            decay = jnp.minimum(config.training.average_decay, (1 + state.step) / (10 + state.step))
            average = optax.incremental_update(_averaged(state), state.average, 1 - decay)
            state = state.replace(average=average)
        return state, metrics

    if config.training.accumulate > 1:
        return _accumulated(config, backward, finish)
    return _pmap(lambda *arguments: finish(*backward(*arguments)), (None, 0, None), (None, None), donate=(0,))


def _accumulated(config: Config, backward: Callable, finish: Callable) -> Callable:
    """The step of `make_train_step` part by part: ``backward`` on each, then ``finish`` on their mean."""
    parts = config.training.accumulate

    def zeros(state, _device):
        loss = losses.Losses(*jnp.zeros(len(dataclasses.fields(losses.Losses))))
        gradients = jax.tree.map(jnp.zeros_like, (state.params, state.adversary and state.adversary.params))
        adversary = state.adversary and adversarial.AdversaryMetrics(*jnp.zeros(3))
        return gradients, (loss, adversary), jnp.zeros((config.model.levels, config.model.num_codes))

    def add(state, sums, images, vgg_params, part):
        state, found = backward(state, images, vgg_params, part)
        return state, jax.tree.map(jnp.add, sums, found)

    def divide(state, sums):
        gradients, loss, counts = sums
        return finish(state, (*jax.tree.map(lambda x: x / parts, (gradients, loss)), counts))

    # Not a scan within one program: XLA runs convolutions in a loop several times slower on a CPU.
    begin = _pmap(zeros, (None, 0), 0)
    add = _pmap(add, (None, 0, 0, None, None), (None, 0), donate=(0, 1))
    divide = _pmap(divide, (None, 0), (None, None), donate=(0,))

    def accumulated_step(state, images, vgg_params):
        sums = begin(state, np.arange(jax.local_device_count()))
        # Cut before it is dealt to devices, so that a part is the same images on any number of them.
        whole = images.reshape(-1, *images.shape[2:])
        for number, part in enumerate(np.split(whole, parts)):
            state, sums = add(state, sums, split_over_devices(part), vgg_params, np.int32(number))
        return divide(state, sums)

    return accumulated_step


def _places(count: int) -> jax.Array:
    """Where this device's ``count`` images are in the whole batch, which ``loader.TrainLoader`` deals to processes."""
    process, device = jnp.divmod(jax.lax.axis_index(AXIS), jax.local_device_count())
    return (device * count + jnp.arange(count)) * jax.process_count() + process


def _pmap(function: Callable, in_axes: tuple, out_axes: Any, donate: tuple[int, ...] = ()) -> Callable:
    pmapped = jax.pmap(function, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate)
    return compilation.with_cpu_options(pmapped, donate)


def make_eval_step(config: Config) -> Callable[[Variables, jax.Array, jax.Array], EvalOutput]:
    """The pmapped evaluation: (variables, images [devices, B, H, W, 1], mask [devices, B]) -> EvalOutput.

    Running statistics stand in for batch statistics. The output's reconstruction and indices keep the
    device axis; its counts are summed over devices and leave padded images (mask 0) out.
    """
    model = VQVAE(config.model, axis_name=AXIS)

    def eval_step(variables, images, mask):
        output = model.apply(variables, images, train=False)
        counts = jnp.stack([masked_counts(indices, mask) for indices in output.indices])
        return output.reconstruction, output.indices, jax.lax.psum(counts, AXIS)

    def masked_counts(indices, mask):
        weights = jnp.broadcast_to(mask[:, None, None], indices.shape).reshape(-1)
        return jnp.zeros(config.model.num_codes).at[indices.reshape(-1)].add(weights)

    pmapped = _pmap(eval_step, (None, 0, 0), (0, 0, None))
    return lambda variables, images, mask: EvalOutput(*pmapped(variables, images, mask))


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
