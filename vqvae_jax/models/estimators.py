"""Gradient estimators: how a gradient passes the choice of a code, which has none of its own."""

import jax
import jax.numpy as jnp

SHORTEST = 1e-6
"""A vector below this length has no direction worth rotating."""
OPPOSITE = 3e-4
"""A sum of two unit vectors below this length has no direction either: the root of float32's precision, where
the error of keeping the direction and that of dropping it are equal."""


def straight_through(latents: jax.Array, codes: jax.Array) -> jax.Array:
    """Codes [..., D] in value, latents [..., D] in gradient: z + sg(q - z) (Bengio et al. 2013, arXiv:1308.3432)."""
    return latents + jax.lax.stop_gradient(codes - latents)


def rotation_trick(latents: jax.Array, codes: jax.Array) -> jax.Array:
    """Codes [..., D] in value; in gradient the latents [..., D], rotated and rescaled (Fifty et al. 2024).

    arXiv:2410.06424: with unit vectors e^ of a latent e and q^ of its code q, and r = (e^ + q^) / |e^ + q^|,

      q~ = sg(|q| / |e| R) e,  R = I - 2 r r^T + 2 q^ e^^T

    so that q~ = q, and the gradient keeps its angle to the code on its way to the latent. R is applied without
    being built. Where e and q are opposite, r is dropped: R is then the reflection that takes one to the other.
    Where either is zero there is nothing to rotate, and the gradient passes straight through.
    """
    e, q = jax.lax.stop_gradient((latents, codes))
    e_length, q_length = _length(e), _length(q)
    e_unit, q_unit = e / jnp.maximum(e_length, SHORTEST), q / jnp.maximum(q_length, SHORTEST)
    between = e_unit + q_unit
    between_length = _length(between)
    r = jnp.where(between_length > OPPOSITE, between / jnp.maximum(between_length, OPPOSITE), 0)
    rotated = latents - 2 * r * _dot(r, latents) + 2 * q_unit * _dot(e_unit, latents)
    rescaled = q_length / jnp.maximum(e_length, SHORTEST) * rotated
    moved = jnp.where((e_length > SHORTEST) & (q_length > SHORTEST), rescaled, latents)
    # In exact arithmetic ``moved`` is q; the codes themselves are free of its rounding.
    return q + (moved - jax.lax.stop_gradient(moved))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _length(vectors: jax.Array) -> jax.Array:
    return jnp.sqrt(_dot(vectors, vectors))
