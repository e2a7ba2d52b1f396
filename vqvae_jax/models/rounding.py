"""Rounding of the prior's numbers to those that it computes with as integers; gradients pass straight through it."""

import jax
import jax.numpy as jnp

LARGEST = 127
"""Largest magnitude of a weight or an activation of 8 bits."""
ACTIVATION_BITS, STREAM_BITS, LOGIT_BITS = 4, 8, 5
"""Fractional bits: of activations (0 to 7.94), of the residual stream, of logits (1/32 of a nat)."""
STREAM_LARGEST = 2**15 - 1
"""Largest magnitude of an integer of the residual stream."""
LEAST_WEIGHT_BITS, MOST_WEIGHT_BITS = 4, 11
"""Bounds of a layer's fractional bits: with the least, no shift below goes to the left."""


def straight_through(x: jax.Array, bits: int, low: int, high: int) -> jax.Array:
    """``x`` as the nearest multiple of 2**-bits from low to high multiples; the gradient is 1 within, else 0."""
    scale = 2.0**bits
    inside = jnp.clip(x, low / scale, high / scale)
    nearest = jnp.floor(inside * scale + 0.5) / scale
    return inside + jax.lax.stop_gradient(nearest - inside)


def activation(x: jax.Array) -> jax.Array:
    """``x`` where positive, in 8 bits."""
    return straight_through(x, ACTIVATION_BITS, 0, LARGEST)


def weights(x: jax.Array) -> jax.Array:
    """A layer's weights in 8 bits, with as many fractional bits as the largest of them allows."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    bits = jnp.floor(jnp.log2(LARGEST / jnp.maximum(largest, 1e-6)))
    scale = 2.0 ** jnp.clip(bits, LEAST_WEIGHT_BITS, MOST_WEIGHT_BITS)
    bound = LARGEST / scale
    inside = jnp.clip(x, -bound, bound)
    return inside + jax.lax.stop_gradient(jnp.floor(inside * scale + 0.5) / scale - inside)
