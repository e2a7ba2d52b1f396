"""The training losses: reconstruction, perceptual, similarity, quantizer, adversary. Pure functions of arrays."""

import flax.struct
import jax
import jax.numpy as jnp

from vqvae_jax.config import LossConfig
from vqvae_jax.similarity import ms_ssim, ssim

CHARBONNIER_EPSILON = 1e-3
"""Where the loss turns from a square to an absolute value: Lai et al. 2017 (arXiv:1704.03915), section 3.3."""


@flax.struct.dataclass
class Losses:
    """Scalars float32: ``total``, and the parts whose weighted sum it is (see `total_loss`).

    ``ssim`` is 1 - SSIM and ``ms_ssim`` 1 - MS-SSIM. A part that is switched off is 0. An adversary's part is
    in the total alone (see `adversarial.AdversaryMetrics`).
    """

    total: jax.Array
    reconstruction: jax.Array
    perceptual: jax.Array
    quantizer: jax.Array
    ssim: jax.Array
    ms_ssim: jax.Array


def l1_loss(reconstruction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute difference of two arrays of one shape, float32."""
    return jnp.mean(jnp.abs(_difference(reconstruction, target)))


def l2_loss(reconstruction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared difference of two arrays of one shape, float32."""
    return jnp.mean(_difference(reconstruction, target) ** 2)


def charbonnier_loss(reconstruction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of sqrt(d² + ε²), d the difference of two arrays of one shape, ε `CHARBONNIER_EPSILON`; float32.

    An absolute value that is smooth at 0 (Charbonnier et al. 1994); ε, not 0, for equal arrays.
    """
    return jnp.mean(jnp.sqrt(_difference(reconstruction, target) ** 2 + CHARBONNIER_EPSILON**2))


RECONSTRUCTION = {"l1": l1_loss, "l2": l2_loss, "charbonnier": charbonnier_loss}
"""Losses by the names that LossConfig.reconstruction knows them by."""


def perceptual_loss(features: dict[str, jax.Array], target: dict[str, jax.Array]) -> jax.Array:
    """Mean absolute difference of feature maps, averaged over layers (Johnson et al. 2016, arXiv:1603.08155).

    Args:
      features: layer name to features [N, h, w, c] of the reconstruction.
      target: the same layers of the original.
    """
    return jnp.mean(jnp.stack([l1_loss(features[name], target[name]) for name in target]))


def total_loss(
    config: LossConfig, reconstruction: jax.Array, target: jax.Array, quantizer: jax.Array, perceptual: jax.Array
) -> Losses:
    """The loss and its parts: total = reconstruction + perceptual_weight * perceptual + quantizer +
    ssim_weight * (1 - SSIM) + ms_ssim_weight * (1 - MS-SSIM). A similarity of weight 0 is not computed.

    Args:
      config: the kind of reconstruction loss, and the weights.
      reconstruction, target: images [N, H, W, 1] in [0, 1].
      quantizer, perceptual: scalars.

    Raises:
      ValueError: a similarity is asked of images below 7 x 7.
    """
    difference = RECONSTRUCTION[config.reconstruction](reconstruction, target)
    total = difference + config.perceptual_weight * perceptual + quantizer
    similarity = {"ssim": jnp.float32(0), "ms_ssim": jnp.float32(0)}
    for name, weight, measure in (
        ("ssim", config.ssim_weight, ssim),
        ("ms_ssim", config.ms_ssim_weight, ms_ssim),
    ):
        if weight:
            similarity[name] = 1 - jnp.mean(measure(reconstruction, target))
            total += weight * similarity[name]
    return Losses(total=total, reconstruction=difference, perceptual=perceptual, quantizer=quantizer, **similarity)


def hinge_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 of a discriminator's logits (Lim and Ye 2017,
    arXiv:1705.02894; halved as in VQGAN's code)."""
    return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2


def hinge_generator_loss(fake: jax.Array) -> jax.Array:
    """- mean of a discriminator's logits of reconstructions: lower the more real they look."""
    return -jnp.mean(fake)


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    return a.astype(jnp.float32) - b.astype(jnp.float32)
