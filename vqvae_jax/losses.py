"""The training loss: reconstruction, perceptual, quantizer. Pure functions of arrays."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Losses:
    """Scalars float32: ``total`` = reconstruction + perceptual_weight * perceptual + quantizer."""

    total: jax.Array
    reconstruction: jax.Array
    perceptual: jax.Array
    quantizer: jax.Array


def reconstruction_loss(reconstruction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute difference (L1) of two arrays of one shape, float32."""
    return jnp.mean(jnp.abs(reconstruction.astype(jnp.float32) - target.astype(jnp.float32)))


def perceptual_loss(features: dict[str, jax.Array], target: dict[str, jax.Array]) -> jax.Array:
    """Mean absolute difference of feature maps, averaged over layers (Johnson et al. 2016, arXiv:1603.08155).

    Args:
      features: layer name to features [N, h, w, c] of the reconstruction.
      target: the same layers of the original.
    """
    return jnp.mean(jnp.stack([reconstruction_loss(features[name], target[name]) for name in target]))


def total_loss(
    reconstruction: jax.Array, perceptual: jax.Array, quantizer: jax.Array, perceptual_weight: float
) -> Losses:
    """The weighted sum of scalar losses, with its parts."""
    total = reconstruction + perceptual_weight * perceptual + quantizer
    return Losses(total=total, reconstruction=reconstruction, perceptual=perceptual, quantizer=quantizer)
