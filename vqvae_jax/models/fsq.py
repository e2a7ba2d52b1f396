"""Finite scalar quantization: each number of a latent is rounded to one of a few levels; there is no codebook."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vqvae_jax.models.estimators import straight_through
from vqvae_jax.models.quantizer import CHOICE, QuantizerOutput, code_counts

MARGIN = 1e-3
"""Share of the range kept from the bound, so that no latent is rounded beyond the last level (ibid., A.1)."""


class FiniteScalarQuantizer(nn.Module):
    """Rounds each of d numbers to one of its levels (Mentzer et al. 2023, arXiv:2309.15505, appendix A.1).

    With L levels, h = (L - 1) (1 - MARGIN) / 2, and o = 1/2 for an even L, else 0:
    bounded = tanh(z + tan(o / h)) h - o, quantized = round(bounded) / floor(L / 2), in [-1, 1]. The gradient
    passes straight through the rounding, and there is no loss. Index i has its least significant digit, to
    the base of the first number of levels, in the first place.

    Attributes:
      levels: L of each number; K, the number of codes, is their product.

    A [2, 8, 8, 4] array with levels (8, 5, 5, 5) becomes indices [2, 8, 8] below K = 1000.

    Raises:
      ValueError: the latents' last axis is not d.
    """

    levels: tuple[int, ...]

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        """Rounds latents [..., d]."""
        del train  # nothing is learned
        if latents.shape[-1] != len(self.levels):
            raise ValueError(f"latents {latents.shape} must end in the number of levels, {len(self.levels)}")
        bounded = self._bounded(latents.astype(jnp.float32))
        digits = jnp.round(bounded).astype(jnp.int32) + self._half
        indices = jnp.sum(digits * self._basis, axis=-1, dtype=jnp.int32)
        indices = checkpoint_name(jax.lax.stop_gradient(indices), CHOICE)
        zero = jnp.float32(0)
        return QuantizerOutput(
            quantized=straight_through(bounded / self._half, self.lookup(indices)).astype(latents.dtype),
            indices=indices,
            loss=zero,
            codebook_loss=zero,
            commitment_loss=zero,
            entropy_loss=zero,
            counts=code_counts(indices, math.prod(self.levels)),
        )

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes float32 [..., d] in [-1, 1] of indices [...]."""
        digits = jnp.asarray(indices)[..., None] // self._basis % np.array(self.levels, np.int32)
        return (digits - self._half).astype(jnp.float32) / self._half

    def _bounded(self, z: jax.Array) -> jax.Array:
        levels = np.array(self.levels)
        half_range = (levels - 1) * (1 - MARGIN) / 2
        # An even number of levels lies unevenly around 0; the shift lets a latent of 0 still become 0.
        offset = np.where(levels % 2 == 0, 0.5, 0)
        shift = np.tan(offset / half_range)
        return jnp.tanh(z + np.float32(shift)) * np.float32(half_range) - np.float32(offset)

    @property
    def _half(self) -> np.ndarray:
        return np.array(self.levels, np.int32) // 2

    @property
    def _basis(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]], dtype=np.int32)
