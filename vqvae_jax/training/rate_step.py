"""One step of training a model and the prior over its codes together, so that its codes take fewer bits.

The third stage of RDVQ (arXiv:2604.10546); the first two are ``scripts/train.py`` and ``scripts/train_prior.py``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqvae_jax.config import AugmentationConfig, Config, PriorConfig
from vqvae_jax.models.quantizer import EMA, squared_distances
from vqvae_jax.models.vgg16 import VGG16
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime.randomness import Purpose, key_for
from vqvae_jax.training.augmentation import augment
from vqvae_jax.training.prior_step import codebook_of, cross_entropy, draw_masks, make_prior, unknown_nats
from vqvae_jax.training.state import RateState, Variables
from vqvae_jax.training.step import AXIS, StepMetrics, losses_of, places, pmapped, recomputing

TEMPERATURE = 0.25
"""Of the soft assignment: a share of the mean squared distance between latents and their codes. No other was tried."""
RISING_SHARE = 1 / 3
"""Share of the training in which the rate's weight rises from 0."""


def soft_nats(latents: jax.Array, codebook: jax.Array, logits: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Cross-entropy of soft assignments and the prior: float32 [...], nats of each position.

    sum over k of q_k * -log p_k, with q = softmax(-|z - e_k|^2 / T) and p the prior's distribution. T is TEMPERATURE
    times the mean of the least distances.

    Args:
      latents: float32 [..., d].
      codebook: [K, d].
      logits: of p, [..., K].
      axis_name: the pmapped axis over whose devices the mean is taken.
    """
    distances = squared_distances(latents, codebook)
    least = jnp.mean(jax.lax.stop_gradient(jnp.min(distances, axis=-1)))
    scale = TEMPERATURE * (least if axis_name is None else jax.lax.pmean(least, axis_name))
    assignment = jax.nn.softmax(-distances / jnp.maximum(scale, 1e-12), axis=-1)
    return -jnp.sum(assignment * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def weight_at(config: Config, step: jax.Array, steps: int) -> jax.Array:
    """The rate's weight at a step of ``steps``: it rises from 0, then stays."""
    return config.loss.rate_weight * jnp.minimum(1, step / max(1, round(RISING_SHARE * steps)))


def make_rate_train_step(
    config: Config, prior_config: PriorConfig, steps: int
) -> Callable[[RateState, dict[str, Any], Variables | None], tuple]:
    """The pmapped step: (RateState, clips [devices, B, ...], VGG16's variables) -> (RateState, StepMetrics).

    The model's loss is that of ``make_train_step`` + weight * bits a pixel. The codebook stays as it is. The prior's
    loss is that of ``make_prior_train_step``. The slices before are encoded as for coding, without gradient.

    Args:
      config: the run's configuration.
      prior_config: its prior's.
      steps: of the whole training.
    """
    model, prior = VQVAE(config.model, axis_name=AXIS), make_prior(prior_config, config.model)
    vgg = VGG16(layers=config.loss.perceptual_layers, dtype=jnp.dtype(config.model.precision))
    bits_a_pixel = 1 / (jnp.log(2.0) * config.model.downsampling**2)  # of nats a code

    def train_step(state, clips, vgg_variables):
        images, before = _augmented(config, state.step, clips)
        variables, codebook = state.variables, codebook_of(state.variables)
        flat = before.reshape(-1, *images.shape[1:])
        before = VQVAE(config.model).apply(variables, flat, method="to_indices")
        before = before.reshape(*clips["present"].shape, *before.shape[1:])
        known, weights, present = draw_masks(prior_config, state.step, clips["present"], before.shape[2:])

        def forward(params, images):
            model_state = state.model.model_state
            rngs = {EMA: key_for(config.training.seed, Purpose.CODEBOOK, state.step)}
            return model.apply(
                {"params": params, **model_state}, images, train=True, mutable=list(model_state), rngs=rngs
            )

        def loss_fn(params, prior_params):
            output, model_state = recomputing(forward, config.training.remat)(params, images)
            losses, indices = losses_of(config.loss, vgg, vgg_variables, output, images), output.quantizer.indices
            logits = prior.apply({"params": prior_params}, indices, known, before, present)
            nats = soft_nats(output.quantizer.latents, codebook, jax.lax.stop_gradient(logits), AXIS)
            rate = bits_a_pixel * jnp.mean(jnp.sum(weights * nats, axis=(1, 2)))
            total = losses.total + weight_at(config, state.step, steps) * rate
            hard = cross_entropy(jax.lax.stop_gradient(logits), indices)
            spent = bits_a_pixel * jnp.mean(jnp.sum(weights * hard, axis=(1, 2)))
            losses = losses.replace(total=total, rate=spent)
            return total + unknown_nats(logits, indices, known), (losses, output.quantizer.counts, model_state)

        arguments = (state.params, state.prior.params)
        gradients, (losses, counts, model_state) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(*arguments)
        gradients, losses = jax.lax.pmean((gradients, losses), AXIS)
        own, of_prior = gradients
        own, model_state = _without_codebook(own), {**model_state, **_codebook_state(state.model.model_state)}
        new = RateState(
            state.model.apply_gradients(grads=own, model_state=model_state),
            state.prior.apply_gradients(grads=of_prior),
        )
        return new, StepMetrics(losses, optax.tree.norm(own), jax.lax.psum(counts, AXIS))

    return pmapped(train_step, (None, 0, None), (None, None), donate=(0,))


def _augmented(config: Config, step: jax.Array, clips: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Images [B, H, W, 1] and those before [B, neighbours, H, W, 1], changed alike."""
    images, before = clips["images"], clips["before"]
    if config.augmentation == AugmentationConfig():
        return images, before
    key, rows = key_for(config.training.seed, Purpose.AUGMENTATION, step), places(len(images))
    clip = jnp.concatenate([images[:, None], before], axis=1)
    changed = augment(
        key, clip.reshape(-1, *images.shape[1:]), config.augmentation, jnp.repeat(rows, clip.shape[1])
    ).reshape(clip.shape)
    return changed[:, 0], changed[:, 1:]


def _codebook_state(model_state: dict[str, Any]) -> dict[str, Any]:
    """What an EMA codebook keeps."""
    return {name: value for name, value in model_state.items() if name == EMA}


def _without_codebook(gradients: Any) -> Any:
    """Gradients with 0 for the codes."""

    def kept(path: tuple, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if jax.tree_util.keystr(path[-1:], simple=True) == "codebook" else leaf

    return jax.tree_util.tree_map_with_path(kept, gradients)
