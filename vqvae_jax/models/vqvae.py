"""The VQ-VAE: encoder, quantizer and decoder for images of one channel."""

import re
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vqvae_jax.config import ModelConfig
from vqvae_jax.models.layers import (
    Conv,
    Downsample,
    Dtype,
    Norm,
    SelfAttention,
    Upsample,
    leaky_relu,
    residual_stack,
)
from vqvae_jax.models.quantizer import EMAVectorQuantizer, ProjectedQuantizer, QuantizerOutput, VectorQuantizer


class Encoder(nn.Module):
    """Images [N, H, W, 1] to latents [N, h, w, embedding_dim], where h = H / 2**halvings and w = W / 2**halvings."""

    hidden_channels: int
    embedding_dim: int
    residual_blocks: int = 2
    latent_norm: bool = True
    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    halvings: int = 2
    residual: Literal["post", "pre"] = "post"
    attention: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shared = {"axis_name": self.axis_name, "dtype": self.dtype}
        x = Downsample(self.hidden_channels // 2, self.dtype, name="down1")(x)
        x = leaky_relu(Norm(**shared, name="norm1")(x, train=train))
        x = Downsample(self.hidden_channels, self.dtype, name="down2")(x)
        x = leaky_relu(Norm(**shared, name="norm2")(x, train=train))
        for number in range(1, self.halvings - 1):
            x = Downsample(self.hidden_channels, self.dtype, name=f"extra_down{number}")(x)
            x = leaky_relu(Norm(**shared, name=f"extra_norm{number}")(x, train=train))
        x = residual_stack(x, self.residual_blocks, train=train, residual=self.residual, **shared)
        if self.attention:
            x = SelfAttention(self.dtype, name="attention")(x)
        x = Conv(self.embedding_dim, dtype=self.dtype, name="conv3")(x)
        return Norm(**shared, name="norm3")(x, train=train) if self.latent_norm else x


class Decoder(nn.Module):
    """Code vectors [N, h, w, D] to images [N, 2**halvings h, 2**halvings w, 1] in [0, 1], float32."""

    hidden_channels: int
    residual_blocks: int = 2
    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    halvings: int = 2
    residual: Literal["post", "pre"] = "post"
    attention: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shared = {"axis_name": self.axis_name, "dtype": self.dtype}
        x = Conv(self.hidden_channels, dtype=self.dtype, name="conv1")(x)
        x = leaky_relu(Norm(**shared, name="norm1")(x, train=train))
        if self.attention:
            x = SelfAttention(self.dtype, name="attention")(x)
        x = residual_stack(x, self.residual_blocks, train=train, residual=self.residual, **shared)
        for number in range(1, self.halvings - 1):
            x = Upsample(self.hidden_channels, self.dtype, name=f"extra_up{number}")(x)
            x = leaky_relu(Norm(**shared, name=f"extra_norm{number}")(x, train=train))
        x = Upsample(self.hidden_channels // 2, self.dtype, name="up1")(x)
        x = leaky_relu(Norm(**shared, name="norm2")(x, train=train))
        x = Upsample(1, self.dtype, name="up2")(x)
        return nn.sigmoid(x.astype(jnp.float32))


@flax.struct.dataclass
class VQVAEOutput:
    """``reconstruction`` [N, H, W, 1] in [0, 1], and the quantizer's output."""

    reconstruction: jax.Array
    quantizer: QuantizerOutput


def make_quantizer(config: ModelConfig, axis_name: str | None = None) -> nn.Module:
    """The quantizer of a configuration, for latents [..., embedding_dim].

    Every quantizer has the interface of ``VectorQuantizer``: a call with ``train`` that returns a
    ``QuantizerOutput``, and ``lookup``. ``axis_name`` is the pmapped axis whose devices share it.
    """
    kind = EMAVectorQuantizer if config.codebook_update == "ema" else VectorQuantizer
    quantizer = kind(config.num_embeddings, config.codebook_dim, axis_name=axis_name)
    return ProjectedQuantizer(quantizer, config.code_dim, config.embedding_dim) if config.code_dim else quantizer


class VQVAE(nn.Module):
    """A vector-quantized variational autoencoder (van den Oord et al. 2017, arXiv:1711.00937).

    Attributes:
      config: widths, number of codes, compute type.
      axis_name: the pmapped axis over which batch norm and the quantizer take their statistics; None on one device.

    Example:
      >>> model = VQVAE(ModelConfig(image_size=(32, 16), hidden_channels=16, num_embeddings=64))
      >>> images = jnp.zeros((2, 32, 16, 1))
      >>> variables = model.init(jax.random.key(0), images)
      >>> latents = model.apply(variables, images, method="encode")
      >>> indices = model.apply(variables, latents, method="quantize").indices
      >>> indices.shape
      (2, 8, 4)
      >>> vectors = model.apply(variables, indices, method="lookup")
      >>> model.apply(variables, vectors, method="decode").shape
      (2, 32, 16, 1)
      >>> indices = model.apply(variables, images, method="to_indices")
      >>> model.apply(variables, indices, method="from_indices").shape
      (2, 32, 16, 1)
    """

    config: ModelConfig
    axis_name: str | None = None

    def setup(self):
        config = self.config
        shared = {
            "hidden_channels": config.hidden_channels,
            "residual_blocks": config.residual_blocks,
            "axis_name": self.axis_name,
            "dtype": jnp.dtype(config.precision),
            "halvings": config.halvings,
            "residual": config.residual,
            "attention": config.attention,
        }
        self.encoder = Encoder(embedding_dim=config.embedding_dim, latent_norm=config.latent_norm, **shared)
        self.quantizer = make_quantizer(config, self.axis_name)
        self.decoder = Decoder(**shared)

    def __call__(self, images: jax.Array, *, train: bool = False) -> VQVAEOutput:
        """Encodes, quantizes and decodes images [N, H, W, 1] in [0, 1]; H and W are multiples of the downsampling."""
        quantized = self.quantize(self.encode(images, train=train), train=train)
        return VQVAEOutput(self.decode(quantized.quantized, train=train), quantized)

    def encode(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Latents [N, h, w, D] of images [N, H, W, 1]."""
        return self.encoder(images, train=train)

    def quantize(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        """Nearest codes of latents [N, h, w, D]."""
        if not self.config.reference_flatten:
            return self.quantizer(latents, train=train)
        output = self.quantizer(_reference_rows(latents), train=train)
        return output.replace(quantized=_from_reference_rows(output.quantized))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Code vectors [N, h, w, D] of indices int32 [N, h, w]."""
        vectors = self.quantizer.lookup(indices)
        return _from_reference_rows(vectors) if self.config.reference_flatten else vectors

    def decode(self, vectors: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [N, H, W, 1] in [0, 1] of vectors [N, h, w, D]."""
        return self.decoder(vectors, train=train)

    def to_indices(self, images: jax.Array) -> jax.Array:
        """Indices int32 [N, h, w] of images [N, H, W, 1]: all that is kept of them."""
        return self.quantize(self.encode(images)).indices

    def to_latents(self, images: jax.Array) -> jax.Array:
        """What the codes are chosen by, float32 [N, h, w, d], of images [N, H, W, 1]."""
        return self.quantize(self.encode(images)).latents

    def from_codes(self, codes: jax.Array) -> jax.Array:
        """Images [N, H, W, 1] in [0, 1] of vectors [N, h, w, d], such as codes are."""
        vectors = self.quantizer.widen(codes)
        return self.decode(_from_reference_rows(vectors) if self.config.reference_flatten else vectors)

    def from_indices(self, indices: jax.Array) -> jax.Array:
        """Images [N, H, W, 1] in [0, 1] of indices int32 [N, h, w]."""
        return self.decode(self.lookup(indices))


# The published code flattens [N, D, h, w] with view(-1, D), channels not moved last, so that its "vectors" are
# runs of one channel's pixels (and straddle channels where D does not divide h * w). Its weights need the same.
def _reference_rows(latents: jax.Array) -> jax.Array:
    """[N, h, w, D] to as many rows of D numbers, [N, h, w, D], in the published order."""
    return latents.transpose(0, 3, 1, 2).reshape(latents.shape)


def _from_reference_rows(rows: jax.Array) -> jax.Array:
    """Inverse of ``_reference_rows``."""
    n, height, width, dim = rows.shape
    return rows.reshape(n, dim, height, width).transpose(0, 2, 3, 1)


def decoding_variables(variables: Any) -> dict[str, jax.Array]:
    """Those of a model's variables that decoding depends on, by their path: the decoder's and the codebook's."""
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(variables)
    }
    decoder = re.compile(r"\w+/decoder/|params/quantizer/project_out/|.*/codebook$")
    return {path: leaf for path, leaf in paths.items() if decoder.match(path)}
