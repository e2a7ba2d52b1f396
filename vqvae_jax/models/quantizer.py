"""The vector quantizer: each position's vector is replaced by the nearest code of a learned codebook."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class QuantizerOutput:
    """What the quantizer returns for latents [..., D].

    Attributes:
      quantized: [..., D], the chosen codes; gradients pass straight through to the latents.
      indices: int32 [...], which code was chosen.
      loss: codebook_loss + commitment_cost * commitment_loss.
      codebook_loss: mean squared distance, moving the codes towards the latents.
      commitment_loss: the same distance, moving the latents towards the codes.
      counts: float32 [K], how often each code was chosen.
    """

    quantized: jax.Array
    indices: jax.Array
    loss: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array
    counts: jax.Array


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a straight-through gradient (van den Oord et al. 2017, arXiv:1711.00937).

    For latents z and the nearest code e: quantized = z + sg(e - z) and
    loss = mean((sg(z) - e)^2) + commitment_cost * mean((z - sg(e))^2), with sg the stop-gradient.
    Distances, the choice and the losses are float32 whatever the type of the latents.

    Attributes:
      num_embeddings: number K of codes.
      embedding_dim: width D of a code.
      commitment_cost: weight of the commitment loss.

    A [2, 8, 8, 64] array with K = 512, D = 64 becomes indices [2, 8, 8] and counts [512] that sum to 128.

    Raises:
      ValueError: the latents' last axis is not D.
    """

    num_embeddings: int
    embedding_dim: int
    commitment_cost: float = 0.25

    def setup(self):
        bound = 1 / self.num_embeddings

        def uniform(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        self.embedding = self.param("embedding", uniform, (self.num_embeddings, self.embedding_dim))

    def __call__(self, latents: jax.Array) -> QuantizerOutput:
        if latents.shape[-1] != self.embedding_dim:
            raise ValueError(f"latents {latents.shape} must end in the code width, {self.embedding_dim}")
        z = latents.astype(jnp.float32)
        indices = self.nearest(z)
        codes = self.lookup(indices)
        codebook_loss = jnp.mean(jnp.square(jax.lax.stop_gradient(z) - codes)) if z.size else jnp.float32(0)
        commitment_loss = jnp.mean(jnp.square(z - jax.lax.stop_gradient(codes))) if z.size else jnp.float32(0)
        counts = jnp.zeros(self.num_embeddings, jnp.float32).at[indices.reshape(-1)].add(1)
        return QuantizerOutput(
            quantized=(z + jax.lax.stop_gradient(codes - z)).astype(latents.dtype),
            indices=indices,
            loss=codebook_loss + self.commitment_cost * commitment_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            counts=counts,
        )

    def nearest(self, latents: jax.Array) -> jax.Array:
        """Indices int32 [...] of the codes nearest to float32 latents [..., D]; the lowest of equals."""
        flat = jax.lax.stop_gradient(latents).reshape(-1, self.embedding_dim)
        # |z - e|^2 without |z|^2, which is the same for every code.
        products = jnp.matmul(flat, self.embedding.T, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.sum(jnp.square(self.embedding), axis=1) - 2 * products
        return jnp.argmin(distances, axis=1).astype(jnp.int32).reshape(latents.shape[:-1])

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes float32 [..., D] of indices [...]."""
        return jnp.take(self.embedding, indices, axis=0)
