"""Batch norm's own gradient is that of automatic differentiation in float64, over devices and in bfloat16 too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models.batch_norm import add_bias, batch_norm

EPSILON, AXIS = 1e-5, "batch"
RNG = np.random.default_rng(0)
SCALE, BIAS = np.float32(RNG.uniform(0.5, 2, 6)), np.float32(RNG.normal(size=6))
COTANGENT = np.float32(RNG.normal(size=(8, 5, 4, 6)))


def batch(offset):
    """Images [8, 5, 4, 6] whose channels lie around ``offset``."""
    return np.float32(offset + RNG.normal(size=(8, 5, 4, 6)) * RNG.uniform(0.5, 3, 6))


def plain(x, scale, bias):
    """The definition, with NumPy's or JAX's own sums."""
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    return (x - mean) / (variance + EPSILON) ** 0.5 * scale + bias, mean, variance


def exact(x, cotangent):
    """Result, mean, variance and gradients by the definition, in float64."""
    with jax.enable_x64(True):
        arguments = tuple(jnp.float64(value) for value in (x, SCALE, BIAS))
        found, pull = jax.vjp(plain, *arguments)
        gradients = pull((jnp.float64(cotangent), jnp.zeros(6, jnp.float64), jnp.zeros(6, jnp.float64)))
        return jax.device_get((found, gradients))


def ours(x, cotangent, axis_name=None):
    """The same of ``batch_norm``."""
    found, pull = jax.vjp(lambda *arguments: batch_norm(*arguments, EPSILON, axis_name), x, SCALE, BIAS)
    return found, pull((cotangent, jnp.zeros(6), jnp.zeros(6)))


def assert_close(found, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float64(a), b, rtol=tolerance, atol=tolerance), found, expected
    )


@pytest.mark.parametrize("offset", [0, 100, -1000])
def test_values_and_gradients_are_those_of_float64(offset):
    """A channel far from zero loses what float32 rounds its mean by, in each pixel of a sum; E[x^2] would lose more."""
    x = batch(offset)
    rounding = np.finfo(np.float32).eps * abs(offset) * x[..., 0].size
    assert_close(jax.jit(ours)(x, COTANGENT), exact(x, COTANGENT), 1e-5 + rounding)


def test_devices_together_are_one_batch():
    """On an axis of four, statistics and the gradient of each part are those of the whole batch."""
    x = batch(3)
    (result, mean, variance), (to_x, to_scale, to_bias) = exact(x, COTANGENT)
    parts = [values.reshape(4, 2, *values.shape[1:]) for values in (x, COTANGENT)]
    found, gradients = jax.vmap(lambda *part: ours(*part, AXIS), axis_name=AXIS)(*parts)
    assert_close(found[0].reshape(result.shape), result, 1e-5)
    assert_close((found[1], found[2]), (np.tile(mean, (4, 1)), np.tile(variance, (4, 1))), 1e-5)
    assert_close(gradients[0].reshape(to_x.shape), to_x, 1e-5)
    assert_close((gradients[1].sum(0), gradients[2].sum(0)), (to_scale, to_bias), 1e-5)


def test_bfloat16_is_summed_in_float32():
    x, cotangent = (jnp.asarray(values, jnp.bfloat16) for values in (batch(50), COTANGENT))
    found, gradients = jax.jit(ours)(x, cotangent)
    expected, expected_gradients = exact(x, cotangent)
    assert found[0].dtype == gradients[0].dtype == jnp.bfloat16
    assert found[1].dtype == gradients[1].dtype == jnp.float32
    assert_close((found[1:], gradients[1:]), (expected[1:], expected_gradients[1:]), 1e-4)
    assert_close((found[0], gradients[0]), (expected[0], expected_gradients[0]), 2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_biass_gradient_is_summed_in_float32(dtype):
    """Of 4096 ones, a sum in bfloat16 would stop at 256."""
    x, bias = jnp.zeros((4, 32, 32, 3), dtype), jnp.arange(3.0)
    found, pull = jax.vjp(add_bias, x, bias)
    to_x, to_bias = pull(jnp.ones_like(found))
    assert found.dtype == to_x.dtype == dtype
    np.testing.assert_array_equal(np.float32(found), np.broadcast_to([0, 1, 2], x.shape))
    np.testing.assert_array_equal(np.float32(to_x), 1)
    np.testing.assert_array_equal(to_bias, [4096] * 3)
