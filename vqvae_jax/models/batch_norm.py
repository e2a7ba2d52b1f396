"""Batch norm and biases with gradients of their own, whose sums over pixels XLA cannot fuse with anything."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

STATISTICS = "statistics"
"""Name, for ``jax.checkpoint``, of each channel's mean and deviation: little to keep, slow to compute again."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, a channel at a time (arXiv:1502.03167, algorithm 1).

    On a CPU, XLA puts all that leads to ``x`` into each sum over its pixels, and computes it anew each time. Here a
    sum is a product with a row of ones, which XLA never fuses. The gradient is the paper's (section 3), with the sums
    taken in the same way.

    Args:
      x: [..., C], of any float type; statistics and the result's arithmetic are float32.
      scale, bias: float32 [C].
      epsilon: added to the variance.
      axis_name: the pmapped axis over whose devices the statistics are taken; None for this device alone.

    Returns:
      The result in ``x``'s shape and type; mean and (biased) variance, float32 [C], through which no gradient passes.
    """
    return _forward(x, scale, bias, epsilon, axis_name)[0]


def _forward(x, scale, bias, epsilon, axis_name):
    values = x.astype(jnp.float32)
    mean = checkpoint_name(_mean(values, axis_name), STATISTICS)
    variance = checkpoint_name(_mean(jnp.square(values - mean), axis_name), STATISTICS)
    deviation = jax.lax.rsqrt(variance + epsilon)
    result = ((values - mean) * (deviation * scale) + bias).astype(x.dtype)
    return (result, mean, variance), (x, mean, deviation, scale)


def _backward(epsilon, axis_name, kept, cotangents):
    del epsilon
    x, mean, deviation, scale = kept
    gradient = cotangents[0].astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * deviation
    to_bias, to_scale = channel_sums(gradient), channel_sums(gradient * normal)
    pixels = x.size // x.shape[-1]
    # The result depends on the statistics, so on every device's pixels.
    if axis_name is None:
        of_all = (to_bias / pixels, to_scale / pixels)
    else:
        of_all = jax.lax.pmean((to_bias / pixels, to_scale / pixels), axis_name)
    to_x = (deviation * scale) * (gradient - of_all[0] - normal * of_all[1])
    return to_x.astype(x.dtype), to_scale, to_bias


batch_norm.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias: [..., C], [C] -> [..., C], in ``x``'s type. The gradient by the bias is a sum in float32."""
    return x + bias.astype(x.dtype)


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), None),
    lambda _, gradient: (gradient, channel_sums(gradient.astype(jnp.float32))),
)


def _mean(values: jax.Array, axis_name: str | None) -> jax.Array:
    mean = channel_sums(values) / (values.size // values.shape[-1])
    return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def channel_sums(values: jax.Array) -> jax.Array:
    """Sum over all axes but the last: float32 [..., C] -> [C]. On a CPU it is a product, which XLA never fuses."""
    flat = values.reshape(-1, values.shape[-1])
    if jax.default_backend() != "cpu":
        return jnp.sum(flat, axis=0)
    ones = jnp.ones((1, len(flat)), jnp.float32)
    return jnp.matmul(ones, flat, precision=jax.lax.Precision.HIGHEST)[0]
