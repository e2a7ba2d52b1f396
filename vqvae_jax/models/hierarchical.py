"""The two levels of VQ-VAE-2: coarse codes, and finer ones that add to them."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae_jax.models.layers import Conv, Downsample, Dtype, Norm, Upsample, leaky_relu, residual_stack
from vqvae_jax.models.quantizer import QuantizerOutput


class TopEncoder(nn.Module):
    """Features [N, h, w, C] to features [N, h / 2, w / 2, C]: one more halving, and residual blocks."""

    residual_blocks: int
    axis_name: str | None
    dtype: Dtype
    norm: Literal["batch", "group"]
    residual: Literal["post", "pre"]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shared = {"axis_name": self.axis_name, "dtype": self.dtype}
        x = Downsample(x.shape[-1], self.dtype, name="down")(x)
        x = leaky_relu(Norm(**shared, kind=self.norm, name="norm")(x, train=train))
        return residual_stack(x, self.residual_blocks, train=train, norm=self.norm, residual=self.residual, **shared)


class TopDecoder(nn.Module):
    """Code vectors [N, h / 2, w / 2, D] to features [N, h, w, hidden_channels], which the finer codes depend on."""

    hidden_channels: int
    residual_blocks: int
    axis_name: str | None
    dtype: Dtype
    norm: Literal["batch", "group"]
    residual: Literal["post", "pre"]
    upsampling: Literal["transposed", "nearest"]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shared = {"axis_name": self.axis_name, "dtype": self.dtype}
        x = Conv(self.hidden_channels, 3, padding=1, dtype=self.dtype, name="conv")(x)
        x = leaky_relu(Norm(**shared, kind=self.norm, name="norm")(x, train=train))
        x = residual_stack(x, self.residual_blocks, train=train, norm=self.norm, residual=self.residual, **shared)
        return Upsample(self.hidden_channels, self.dtype, self.upsampling, name="up")(x)


class Latents(nn.Module):
    """Features [N, h, w, C] to latents [N, h, w, embedding_dim], normalised with ``norm`` unless that is None."""

    embedding_dim: int
    axis_name: str | None
    dtype: Dtype
    norm: Literal["batch", "group"] | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = Conv(self.embedding_dim, 3, padding=1, dtype=self.dtype, name="conv")(x)
        if self.norm is None:
            return x
        return Norm(self.axis_name, self.dtype, self.norm, name="norm")(x, train=train)


class HierarchicalQuantizer(nn.Module):
    """Quantizes an encoder's features at two levels (Razavi et al. 2019, VQ-VAE-2, arXiv:1906.00446, algorithm 1).

    The features are halved once more and quantized: the top level. The bottom level's latents are made from the
    features and the decoded top codes, so that they need to say only what the top ones do not. The decoder is given
    both levels' codes, the top ones enlarged by a learned layer. It has the interface of the other quantizers, with
    features for latents, and gives a ``QuantizerOutput`` of two levels, the bottom one first.

    Attributes:
      bottom, top: the levels' quantizers, of D = ``embedding_dim``, each with a codebook of its own.

    Features [2, 8, 8, C] become indices ([2, 8, 8], [2, 4, 4]) and vectors [2, 8, 8, 2 D].
    """

    bottom: nn.Module
    top: nn.Module
    hidden_channels: int
    embedding_dim: int
    residual_blocks: int = 2
    latent_norm: bool = True
    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    norm: Literal["batch", "group"] = "batch"
    residual: Literal["post", "pre"] = "post"
    upsampling: Literal["transposed", "nearest"] = "transposed"

    def setup(self):
        shared = {"axis_name": self.axis_name, "dtype": self.dtype}
        stack = shared | {"residual_blocks": self.residual_blocks, "norm": self.norm, "residual": self.residual}
        latents = shared | {"embedding_dim": self.embedding_dim, "norm": self.norm if self.latent_norm else None}
        self.encoder_top = TopEncoder(**stack)
        self.latents_top = Latents(**latents)
        self.decoder_top = TopDecoder(hidden_channels=self.hidden_channels, upsampling=self.upsampling, **stack)
        self.latents_bottom = Latents(**latents)
        self.upsample_top = Upsample(self.embedding_dim, self.dtype, self.upsampling)

    def __call__(self, features: jax.Array, *, train: bool = False) -> QuantizerOutput:
        """Codes of features [N, h, w, C], h and w even; ``quantized`` is [N, h, w, 2 D]."""
        latents = self.latents_top(self.encoder_top(features, train=train), train=train)
        top = self.top(latents, train=train)
        decoded = self.decoder_top(top.quantized, train=train)
        latents = self.latents_bottom(jnp.concatenate([features, decoded], axis=-1), train=train)
        bottom = self.bottom(latents, train=train)
        return QuantizerOutput(
            quantized=self._joined(bottom.quantized, top.quantized),
            indices=(bottom.indices, top.indices),
            loss=bottom.loss + top.loss,
            codebook_loss=bottom.codebook_loss + top.codebook_loss,
            commitment_loss=bottom.commitment_loss + top.commitment_loss,
            entropy_loss=bottom.entropy_loss + top.entropy_loss,
            counts=jnp.stack([bottom.counts, top.counts]),
        )

    def lookup(self, indices: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Vectors [N, h, w, 2 D] of indices ([N, h, w], [N, h / 2, w / 2]): what the decoder takes."""
        bottom, top = indices
        return self._joined(self.bottom.lookup(bottom), self.top.lookup(top))

    def _joined(self, bottom: jax.Array, top: jax.Array) -> jax.Array:
        return jnp.concatenate([bottom, self.upsample_top(top)], axis=-1)
