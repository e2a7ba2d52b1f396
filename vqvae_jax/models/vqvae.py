"""The VQ-VAE: encoder, quantizer and decoder for images of one channel."""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vqvae_jax.config import ModelConfig
from vqvae_jax.models.estimators import rotation_trick, straight_through
from vqvae_jax.models.fsq import FiniteScalarQuantizer
from vqvae_jax.models.hierarchical import HierarchicalQuantizer
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
from vqvae_jax.models.projection import ProjectedQuantizer
from vqvae_jax.models.quantizer import EMAVectorQuantizer, QuantizerOutput, VectorQuantizer

ESTIMATORS = {"straight-through": straight_through, "rotation": rotation_trick}


class Encoder(nn.Module):
    """Images [N, H, W, 1] to latents [N, h, w, embedding_dim], where h = H / 2**halvings and w = W / 2**halvings.

    Without ``embedding_dim``: to what latents are made from, features [N, h, w, hidden_channels].
    """

    hidden_channels: int
    embedding_dim: int | None = None
    residual_blocks: int = 2
    latent_norm: bool = True
    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    norm: Literal["batch", "group"] = "batch"
    halvings: int = 2
    residual: Literal["post", "pre"] = "post"
    attention: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shared = {"axis_name": self.axis_name, "dtype": self.dtype}
        norm = shared | {"kind": self.norm}
        x = Downsample(self.hidden_channels // 2, self.dtype, name="down1")(x)
        x = leaky_relu(Norm(**norm, name="norm1")(x, train=train))
        x = Downsample(self.hidden_channels, self.dtype, name="down2")(x)
        x = leaky_relu(Norm(**norm, name="norm2")(x, train=train))
        for number in range(1, self.halvings - 1):
            x = Downsample(self.hidden_channels, self.dtype, name=f"extra_down{number}")(x)
            x = leaky_relu(Norm(**norm, name=f"extra_norm{number}")(x, train=train))
        x = residual_stack(x, self.residual_blocks, train=train, norm=self.norm, residual=self.residual, **shared)
        if self.attention:
            x = SelfAttention(self.dtype, name="attention")(x)
        if self.embedding_dim is None:
            return x
        x = Conv(self.embedding_dim, 3, padding=1, dtype=self.dtype, name="conv3")(x)
        return Norm(**norm, name="norm3")(x, train=train) if self.latent_norm else x


class Decoder(nn.Module):
    """Code vectors [N, h, w, D] to images [N, 2**halvings h, 2**halvings w, 1] in [0, 1], float32."""

    hidden_channels: int
    residual_blocks: int = 2
    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    norm: Literal["batch", "group"] = "batch"
    halvings: int = 2
    residual: Literal["post", "pre"] = "post"
    attention: bool = True
    upsampling: Literal["transposed", "nearest"] = "transposed"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shared = {"axis_name": self.axis_name, "dtype": self.dtype}
        norm = shared | {"kind": self.norm}
        up = {"dtype": self.dtype, "upsampling": self.upsampling}
        x = Conv(self.hidden_channels, 3, padding=1, dtype=self.dtype, name="conv1")(x)
        x = leaky_relu(Norm(**norm, name="norm1")(x, train=train))
        if self.attention:
            x = SelfAttention(self.dtype, name="attention")(x)
        x = residual_stack(x, self.residual_blocks, train=train, norm=self.norm, residual=self.residual, **shared)
        for number in range(1, self.halvings - 1):
            x = Upsample(self.hidden_channels, **up, name=f"extra_up{number}")(x)
            x = leaky_relu(Norm(**norm, name=f"extra_norm{number}")(x, train=train))
        x = Upsample(self.hidden_channels // 2, **up, name="up1")(x)
        x = leaky_relu(Norm(**norm, name="norm2")(x, train=train))
        x = Upsample(1, **up, name="up2")(x)
        return nn.sigmoid(x.astype(jnp.float32))


@flax.struct.dataclass
class VQVAEOutput:
    """``reconstruction`` [N, H, W, 1] in [0, 1], and the quantizer's output."""

    reconstruction: jax.Array
    quantizer: QuantizerOutput

    @property
    def indices(self) -> tuple[jax.Array, ...]:
        """Indices int32 [N, h, w] of each level, the finest first."""
        return _by_level(self.quantizer.indices)

    @property
    def counts(self) -> jax.Array:
        """How often each code was chosen at each level, the finest first: float32 [levels, K]."""
        return jnp.atleast_2d(self.quantizer.counts)


def _by_level(indices: Any) -> tuple[jax.Array, ...]:
    return indices if isinstance(indices, tuple) else (indices,)


def make_quantizer(config: ModelConfig, axis_name: str | None = None) -> nn.Module:
    """The quantizer of a configuration, for latents [..., embedding_dim].

    Every quantizer has the interface of ``VectorQuantizer``: a call with ``train`` that returns a
    ``QuantizerOutput``, and ``lookup``. ``axis_name`` is the pmapped axis whose devices share it.
    """
    if config.quantizer == "fsq":
        rounding = FiniteScalarQuantizer(config.fsq_levels)
        return ProjectedQuantizer(rounding, len(config.fsq_levels), config.embedding_dim)
    options = {
        "num_embeddings": config.num_embeddings,
        "embedding_dim": config.code_dim or config.embedding_dim,
        "commitment_cost": config.commitment_cost,
        "cosine": config.cosine_codes,
        "entropy_weight": config.entropy_weight,
        "entropy_temperature": config.entropy_temperature,
        "estimator": ESTIMATORS[config.gradient_estimator],
        "axis_name": axis_name,
    }
    if config.codebook_update == "ema":
        codebook = EMAVectorQuantizer(
            **options,
            decay=config.ema_decay,
            kmeans=config.codebook_init == "kmeans",
            revive_below=config.revive_below,
        )
    else:
        codebook = VectorQuantizer(**options)
    return ProjectedQuantizer(codebook, config.code_dim, config.embedding_dim) if config.code_dim else codebook


class VQVAE(nn.Module):
    """A vector-quantized variational autoencoder (van den Oord et al. 2017, arXiv:1711.00937).

    With two levels, VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446): see `HierarchicalQuantizer`. ``encode`` then
    returns features [N, h, w, hidden_channels], vectors are [N, h, w, 2 D], and indices a pair, the finer first.

    Attributes:
      config: widths, number of codes, compute type.
      axis_name: the pmapped axis over which batch norm and the quantizer take their statistics; None on one device.

    Example:
      >>> model = VQVAE(ModelConfig(image_size=(32, 16), hidden_channels=16, num_embeddings=64))
      >>> images = jnp.zeros((2, 32, 16, 1))
      >>> variables = model.init(jax.random.key(0), images)
      >>> latents = model.apply(variables, images, method="encode")
      >>> codes = model.apply(variables, latents, method="quantize").indices
      >>> codes.shape
      (2, 8, 4)
      >>> vectors = model.apply(variables, codes, method="lookup")
      >>> model.apply(variables, vectors, method="decode").shape
      (2, 32, 16, 1)
      >>> model.apply(variables, model.apply(variables, images, method="to_codes"), method="from_codes").shape
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
            "norm": config.norm,
            "residual": config.residual,
        }
        latents = {"embedding_dim": config.embedding_dim, "latent_norm": config.latent_norm}
        up, attention = {"upsampling": config.upsampling}, {"attention": config.attention}
        quantizers = [make_quantizer(config, self.axis_name) for _ in range(config.levels)]
        if config.levels == 2:
            self.encoder = Encoder(halvings=config.halvings, **shared, **attention)
            self.quantizer = HierarchicalQuantizer(*quantizers, **latents, **shared, **up)
        else:
            self.encoder = Encoder(halvings=config.halvings, **latents, **shared, **attention)
            (self.quantizer,) = quantizers
        self.decoder = Decoder(halvings=config.halvings, **shared, **up, **attention)

    def __call__(self, images: jax.Array, *, train: bool = False) -> VQVAEOutput:
        """Encodes, quantizes and decodes images [N, H, W, 1] in [0, 1]; H and W are multiples of the downsampling,
        of twice that with two levels."""
        quantized = self.quantize(self.encode(images, train=train), train=train)
        return VQVAEOutput(self.decode(quantized.quantized, train=train), quantized)

    def encode(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Latents [N, h, w, D] of images [N, H, W, 1]."""
        return self.encoder(images, train=train)

    def quantize(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        """Nearest codes of latents [N, h, w, D]."""
        if not self.config.published_flatten:
            return self.quantizer(latents, train=train)
        output = self.quantizer(_published_rows(latents), train=train)
        return output.replace(quantized=_from_published_rows(output.quantized))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Code vectors [N, h, w, D] of indices int32 [N, h, w]."""
        vectors = self.quantizer.lookup(indices)
        return _from_published_rows(vectors) if self.config.published_flatten else vectors

    def decode(self, vectors: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [N, H, W, 1] in [0, 1] of vectors [N, h, w, D]."""
        return self.decoder(vectors, train=train)

    def to_codes(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """All that is kept of images [N, H, W, 1]: the indices int32 [N, h, w] of each level, the finest first."""
        return _by_level(self.quantize(self.encode(images)).indices)

    def from_codes(self, codes: tuple[jax.Array, ...]) -> jax.Array:
        """Images [N, H, W, 1] in [0, 1] of what ``to_codes`` returned."""
        return self.decode(self.lookup(codes[0] if self.config.levels == 1 else codes))


# The published code flattens [N, D, h, w] with view(-1, D), channels not moved last, so that its "vectors" are
# runs of one channel's pixels (and straddle channels where D does not divide h * w). Its weights need the same.
def _published_rows(latents: jax.Array) -> jax.Array:
    """[N, h, w, D] to as many rows of D numbers, [N, h, w, D], in the published order."""
    return latents.transpose(0, 3, 1, 2).reshape(latents.shape)


def _from_published_rows(rows: jax.Array) -> jax.Array:
    """Inverse of ``_published_rows``."""
    n, height, width, dim = rows.shape
    return rows.reshape(n, dim, height, width).transpose(0, 2, 3, 1)
