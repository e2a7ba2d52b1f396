"""The adversary of a VQGAN: its state, the gradients of both players, and the weight that balances them.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis" (arXiv:2012.09841), section 3.1.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from vqvae_jax import losses
from vqvae_jax.config import Config
from vqvae_jax.errors import ConfigError
from vqvae_jax.models.discriminator import PatchDiscriminator, smallest_side

DISCRIMINATOR = 2
"""Sets the discriminator's initial draws apart from the model's, by the same seed."""
BETAS = (0.5, 0.9)
"""Adam's for the discriminator: the short memory that VQGAN's code gives it, since its opponent moves."""
STABILISER, LARGEST_WEIGHT = 1e-4, 1e4
"""Added to the denominator of the adaptive weight, and its upper bound: VQGAN's code (the paper adds 1e-6)."""
LAST_LAYER = ("decoder", "up2", "kernel")
"""Where the model's parameters have the kernel whose gradients are weighed."""


@flax.struct.dataclass
class AdversaryMetrics:
    """Scalars float32: hinge losses of ``generator`` and ``discriminator``, and the ``weight`` of the generator's.

    ``weight`` is adversarial_weight times the adaptive weight; 0 before the discriminator joins.
    """

    generator: jax.Array
    discriminator: jax.Array
    weight: jax.Array


def create(config: Config, schedule: optax.Schedule) -> train_state.TrainState | None:
    """A fresh discriminator with its optimizer, the same for the same seed; or None where its weight is 0.

    Its ``step`` counts its own updates, and its learning rate is ``schedule``'s at the model's step.

    Raises:
      ConfigError: the images are too small for so many layers.
    """
    loss = config.loss
    if not loss.adversarial_weight:
        return None
    side, smallest = min(config.model.image_size), smallest_side(loss.discriminator_layers)
    if side < smallest:
        raise ConfigError(
            f"--discriminator-layers {loss.discriminator_layers} with --image-size "
            f"{' '.join(map(str, config.model.image_size))}: expected at least {smallest} pixels a side; "
            "take fewer layers, or larger images"
        )
    discriminator = PatchDiscriminator(
        loss.discriminator_channels, loss.discriminator_layers, jnp.dtype(config.model.precision)
    )
    key = jax.random.fold_in(jax.random.key(config.training.seed), DISCRIMINATOR)
    params = jax.jit(discriminator.init)(key, jnp.zeros((1, *config.model.image_size, 1)))["params"]
    optimizer = optax.adam(lambda count: schedule(count + loss.adversarial_start), *BETAS)
    return train_state.TrainState(
        step=jnp.zeros((), jnp.int32),
        apply_fn=discriminator.apply,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(params),
    )


def adaptive_weight(reconstruction: jax.Array, adversarial: jax.Array) -> jax.Array:
    """|reconstruction| / (|adversarial| + 1e-4), at most 1e4: equation 7, of gradients at the decoder's last layer."""
    ratio = jnp.linalg.norm(reconstruction.ravel()) / (jnp.linalg.norm(adversarial.ravel()) + STABILISER)
    return jnp.clip(ratio, 0, LARGEST_WEIGHT)


def make_gradient(config: Config, forward: Callable, compare: Callable, remat: Callable, axis_name: str) -> Callable:
    """The gradients of both players on one device, from the same reconstructions.

    (parameters, state, images [B, H, W, 1], VGG parameters) -> ((model's, discriminator's gradients), (Losses,
    AdversaryMetrics), code counts, new model state). The discriminator's are not yet to be used before it joins.

    Args:
      config: the whole configuration.
      forward: (parameters, state, images) -> (VQVAEOutput, new model state).
      compare: (reconstruction, quantizer's loss, images, VGG parameters) -> Losses without the adversary.
      remat: takes a function and gives it with less kept for its gradient.
      axis_name: the pmapped axis, over which the adaptive weight's gradients are averaged.
    """

    def gradient(params, state, images, vgg_params):
        def run(params):
            output, model_state = forward(params, state, images)
            return (output.reconstruction, output.quantizer.loss), (output.counts, model_state)

        def without_adversary(reconstruction, quantizer):
            parts = compare(reconstruction, quantizer, images, vgg_params)
            return parts.total, parts

        discriminate = remat(lambda params, images: state.adversary.apply_fn({"params": params}, images))

        def generator_loss(reconstruction):
            return losses.hinge_generator_loss(discriminate(state.adversary.params, reconstruction))

        def discriminator_loss(params):
            real, fake = discriminate(params, images), discriminate(params, reconstruction)
            return losses.hinge_discriminator_loss(real, fake)

        (reconstruction, quantizer), pull, (counts, model_state) = jax.vjp(run, params, has_aux=True)
        differentiate = jax.value_and_grad(without_adversary, argnums=(0, 1), has_aux=True)
        (_, parts), (towards_image, towards_codes) = differentiate(reconstruction, quantizer)
        generator, towards_real = jax.value_and_grad(generator_loss)(reconstruction)
        discriminator, own_gradient = jax.value_and_grad(discriminator_loss)(state.adversary.params)

        def at_last_layer(cotangent):
            # XLA computes no more of this backward pass than the one layer that is looked at.
            (found,) = pull((cotangent, jnp.zeros_like(quantizer)))
            for name in LAST_LAYER:
                found = found[name]
            return jax.lax.pmean(found, axis_name)

        weight = adaptive_weight(at_last_layer(towards_image), at_last_layer(towards_real))
        weight = jnp.where(has_joined(config, state), config.loss.adversarial_weight * weight, 0.0)
        (gradients,) = pull((towards_image + weight * towards_real, towards_codes))
        parts = parts.replace(total=parts.total + weight * generator)
        metrics = AdversaryMetrics(generator, discriminator, weight)
        return (gradients, own_gradient), (parts, metrics), counts, model_state

    return gradient


def has_joined(config: Config, state: Any) -> jax.Array:
    """Whether the discriminator takes part in the step that ``state`` is about to take."""
    return state.step >= config.loss.adversarial_start


def update(config: Config, state: Any, gradients: Any) -> train_state.TrainState:
    """The adversary of ``state`` after a step of its own; unchanged before it joins."""
    moved = state.adversary.apply_gradients(grads=gradients)
    return jax.tree.map(lambda new, old: jnp.where(has_joined(config, state), new, old), moved, state.adversary)
