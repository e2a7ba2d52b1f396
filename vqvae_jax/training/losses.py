"""The training losses: reconstruction, perceptual, structural similarity, quantizer. Pure functions of arrays."""

import flax.struct
import jax
import jax.numpy as jnp

VARIANCE = 0.05
"""About that of scans in [0, 1]: it brings L2 to the size of L1 and of the quantizer's loss, beside which a mean square
of 0.002 would count for nothing."""


@flax.struct.dataclass
class Losses:
    """Scalars float32: ``total``, and the parts whose weighted sum it is (see `LossConfig`).

    ``ssim`` is 1 - SSIM, ``rate`` the bits a pixel that a prior spends on the codes. A part that is switched off is 0.
    """

    total: jax.Array
    reconstruction: jax.Array
    perceptual: jax.Array
    quantizer: jax.Array
    ssim: jax.Array
    rate: jax.Array


def l1_loss(reconstruction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute difference of two arrays of one shape, float32."""
    return jnp.mean(jnp.abs(_difference(reconstruction, target)))


def l2_loss(reconstruction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared difference of two arrays of one shape, over VARIANCE, float32."""
    return jnp.mean(_difference(reconstruction, target) ** 2) / VARIANCE


RECONSTRUCTION = {"l1": l1_loss, "l2": l2_loss}
"""Losses by the names that LossConfig.reconstruction knows them by."""


def perceptual_loss(features: dict[str, jax.Array], target: dict[str, jax.Array]) -> jax.Array:
    """Mean absolute difference of feature maps, averaged over layers (Johnson et al. 2016, arXiv:1603.08155).

    Args:
      features: layer name to features [N, h, w, c] of the reconstruction.
      target: the same layers of the original.
    """
    return jnp.mean(jnp.stack([l1_loss(features[name], target[name]) for name in target]))


def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    return a.astype(jnp.float32) - b.astype(jnp.float32)
