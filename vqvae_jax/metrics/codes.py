"""How a codebook is used; pure and jitted."""

import jax
import jax.numpy as jnp


@jax.jit
def code_entropy(counts: jax.Array) -> jax.Array:
    """Entropy of the codes in bits, -Σ p log2 p with p = counts / Σ counts: what a code costs an ideal entropy coder.

    Between 0 (one code) and log2 K (all alike). It depends on how many codes were drawn, so sum the counts over
    a whole split before calling it.

    Args:
      counts: [..., K], how often each code was chosen, as numbers or as shares.

    Returns:
      [...] float32; NaN where nothing was counted.
    """
    counts = jnp.asarray(counts, jnp.float32)
    share = counts / jnp.sum(counts, axis=-1, keepdims=True)
    return jnp.sum(share * jnp.log2(1 / jnp.where(share == 0, 1, share)), axis=-1)


@jax.jit
def perplexity(counts: jax.Array) -> jax.Array:
    """Effective number of codes in use, 2 to the power of `code_entropy`: between 1 (one code) and K (all alike).

    Args:
      counts: [..., K], how often each code was chosen over a whole split.

    Returns:
      [...] float32; 0 where nothing was counted, a value no used codebook can have.
    """
    return jnp.where(jnp.sum(jnp.asarray(counts), axis=-1) > 0, jnp.exp2(code_entropy(counts)), 0.0)


@jax.jit
def codebook_usage(counts: jax.Array) -> jax.Array:
    """Share of the codes chosen at least once, in [0, 1]: counts [..., K] -> [...]."""
    return jnp.mean(jnp.asarray(counts) > 0, axis=-1, dtype=jnp.float32)
