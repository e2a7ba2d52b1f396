"""Finite scalar quantization rounds to a grid that is written out here, code by code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models.fsq import MARGIN, FiniteScalarQuantizer

LEVELS = [(8, 5, 5, 5), (2,), (3, 4), (7, 2, 6), (2, 2, 2)]


def grid(levels):
    """Every code in the order of its index, the first number running fastest: float64 [K, d]."""
    ranges = [(np.arange(count) - count // 2) / (count // 2) for count in levels]
    return np.array([code[::-1] for code in itertools.product(*ranges[::-1])])


def bounded(z, levels):
    """The latent within its bounds, and its derivative, in units of the codes: float64."""
    counts = np.array(levels)
    half = (counts - 1) * (1 - MARGIN) / 2
    offset = 0.5 * (counts % 2 == 0)
    inside = np.tanh(np.float64(z) + np.tan(offset / half))
    return (inside * half - offset) / (counts // 2), (1 - inside**2) * half / (counts // 2)


def latents(*shape, scale=1.5):
    return (scale * np.random.default_rng(shape).standard_normal(shape)).astype(np.float32)


def apply(levels, *arguments, jit=True, **keywords):
    function = FiniteScalarQuantizer(levels).apply
    return (jax.jit(function, static_argnames="method") if jit else function)({}, *arguments, **keywords)


@pytest.mark.parametrize("levels", LEVELS)
def test_indices_and_codes_are_one_to_one(levels):
    expected = grid(levels)
    k = np.prod(levels)
    assert len(np.unique(expected, axis=0)) == k
    codes = apply(levels, np.arange(k), method="lookup")
    np.testing.assert_allclose(codes, expected, rtol=1e-6)
    # Latents that the bounds take to each code, or as near as they let one come, find it again.
    half = (np.array(levels) - 1) * (1 - MARGIN) / 2
    offset = 0.5 * (np.array(levels) % 2 == 0)
    inside = np.clip((expected * (np.array(levels) // 2) + offset) / half, -0.999, 0.999)
    found = apply(levels, (np.arctanh(inside) - np.tan(offset / half)).astype(np.float32))
    np.testing.assert_array_equal(found.indices, np.arange(k))
    np.testing.assert_array_equal(found.counts, 1)


@pytest.mark.parametrize(("levels", "jit"), [*((levels, True) for levels in LEVELS), (LEVELS[0], False)])
def test_finds_the_nearest_code_to_the_bounded_latent(levels, jit):
    z = latents(2, 8, 4, len(levels))
    found = apply(levels, z, jit=jit)
    target, _ = bounded(z, levels)
    weights = np.array(levels) // 2  # one level is one step, whatever its size
    distances = np.square((target[..., None, :] - grid(levels)) * weights).sum(-1)
    two = np.sort(distances, axis=-1)[..., :2]
    clear = two[..., 1] - two[..., 0] > 1e-5
    assert clear.mean() > 0.9
    assert found.indices.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(found.indices)[clear], distances.argmin(-1)[clear])
    np.testing.assert_allclose(found.quantized, grid(levels)[found.indices], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.counts, np.bincount(np.ravel(found.indices), minlength=np.prod(levels)))


@pytest.mark.parametrize("count", range(2, 17))
def test_every_level_is_reached_and_none_beyond(count):
    z = np.concatenate([np.linspace(-6, 6, 4001), [-1e9, 1e9]])[:, None].astype(np.float32)
    found = apply((count,), z)
    np.testing.assert_array_equal(np.unique(found.indices), np.arange(count))
    assert np.all(np.diff(found.indices[:-2]) >= 0)
    np.testing.assert_array_equal(found.indices[-2:], [0, count - 1])
    assert apply((count,), np.zeros((1, 1), np.float32)).quantized == 0


@pytest.mark.parametrize("levels", LEVELS)
def test_gradient_is_that_of_the_bounds_alone(levels):
    z, cotangent = latents(16, len(levels)), latents(16, len(levels), scale=1)[::-1]
    found = jax.jit(jax.grad(lambda z: jnp.sum(apply(levels, z).quantized * cotangent)))(z)
    np.testing.assert_allclose(found, bounded(z, levels)[1] * cotangent, rtol=1e-4, atol=1e-6)


def test_there_is_nothing_to_learn():
    quantizer, z = FiniteScalarQuantizer((8, 5)), latents(4, 2)
    assert quantizer.init(jax.random.key(0), z) == {}
    found = apply((8, 5), z, train=True)
    assert (found.loss, found.codebook_loss, found.commitment_loss, found.entropy_loss) == (0, 0, 0, 0)


def test_bfloat16_latents_round_as_their_float32_values_do():
    z = jnp.asarray(latents(256, 2), jnp.bfloat16)
    found, exact = apply((16, 16), z), apply((16, 16), z.astype(jnp.float32))
    np.testing.assert_array_equal(found.indices, exact.indices)
    assert found.quantized.dtype == jnp.bfloat16
    assert found.loss.dtype == jnp.float32


def test_empty_batch():
    found = apply((8, 5), np.zeros((0, 3, 2), np.float32))
    assert found.quantized.shape == (0, 3, 2)
    assert found.indices.shape == (0, 3)
    assert not np.any(found.counts)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_wrong_width_raises(width):
    with pytest.raises(ValueError, match="must end in the number of levels, 2"):
        apply((8, 5), latents(4, width))
