"""A quantizer that works in another width than its latents', between two learned projections."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqvae_jax.models.quantizer import QuantizerOutput


class ProjectedQuantizer(nn.Module):
    """Latents of width D are projected to the quantizer's own width, and its codes back to D.

    Few dimensions keep more of the codes in use (Yu et al. 2021, arXiv:2110.04627). The
    projections compute in float32, since the choice of a code hangs on them.

    Attributes:
      quantizer: any module with the quantizers' interface, for vectors of width ``code_dim``.
      code_dim: that width.
      embedding_dim: the latents' width D.

    A [2, 8, 8, 64] array, with ``code_dim`` 8, is quantized as [2, 8, 8, 8] and comes back as [2, 8, 8, 64].

    Raises:
      ValueError: the latents' last axis is not D.
    """

    quantizer: nn.Module
    code_dim: int
    embedding_dim: int

    def setup(self):
        self.project_in = nn.Dense(self.code_dim, precision=jax.lax.Precision.HIGHEST)
        self.project_out = nn.Dense(self.embedding_dim, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        """The quantizer's output, with ``quantized`` [..., D]."""
        if latents.shape[-1] != self.embedding_dim:
            raise ValueError(f"latents {latents.shape} must end in the width {self.embedding_dim}")
        output = self.quantizer(self.project_in(latents.astype(jnp.float32)), train=train)
        return output.replace(quantized=self.project_out(output.quantized).astype(latents.dtype))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Projected codes float32 [..., D] of indices [...]: what a decoder takes."""
        return self.project_out(self.quantizer.lookup(indices))
