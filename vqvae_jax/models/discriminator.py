"""The patch discriminator: tells images from reconstructions, one patch at a time."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae_jax.models.layers import Conv, Dtype, Norm, leaky_relu

MOST_WIDENING = 8
"""Channels of the widest layer over those of the first (Isola et al. 2017, section 6.1.2)."""


def smallest_side(layers: int) -> int:
    """Pixels of the shortest side that leaves a logit: three rows or columns for the two last convolutions."""
    return 3 * 2**layers


class PatchDiscriminator(nn.Module):
    """Images [N, H, W, 1] to logits [N, h, w, 1], float32, above 0 where a patch looks real; h = H // 2**layers - 2.

    PatchGAN (Isola et al. 2017, arXiv:1611.07004), as VQGAN has it (Esser et al. 2021, arXiv:2012.09841): 4 x 4
    convolutions, ``layers`` of stride 2 and two of stride 1, so that a logit's patch is 9 * 2**layers - 2 pixels
    wide: 70 for 3 layers. Two things differ. Group norm stands for batch norm: an image's logits depend on no other
    image, so that real and reconstructed ones may share a batch, however it is cut into parts and over devices. And
    kernels start as everywhere in this package, not from N(0, 0.02), which the norms would scale away.

    Attributes:
      channels: channels of the first layer; each next one has twice as many, up to ``MOST_WIDENING`` times.
      layers: convolutions of stride 2.
      dtype: type the convolutions compute in.
    """

    channels: int = 64
    layers: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = Conv(self.channels, 4, stride=2, padding=1, dtype=self.dtype, name="conv0")(images)
        x = leaky_relu(x)
        for number in range(1, self.layers + 1):
            width, stride = self.channels * min(2**number, MOST_WIDENING), 2 if number < self.layers else 1
            x = Conv(width, 4, stride=stride, padding=1, dtype=self.dtype, name=f"conv{number}")(x)
            x = leaky_relu(Norm(dtype=self.dtype, kind="group", name=f"norm{number}")(x, train=True))
        return Conv(1, 4, padding=1, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
