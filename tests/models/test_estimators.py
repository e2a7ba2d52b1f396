"""Each estimator gives the codes, and the latents the gradient of its definition, built here as a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models.estimators import OPPOSITE, rotation_trick, straight_through

SHAPES = [(2, 3, 4, 5), (6, 2), (3,), (7, 64)]


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def pull_back(estimator, latents, codes, cotangent, jit=True):
    """Value, and gradients of latents and codes for a cotangent."""

    def both(latents, codes, cotangent):
        value, back = jax.vjp(estimator, latents, codes)
        return value, *back(cotangent)

    return jax.device_get((jax.jit(both) if jit else both)(latents, codes, cotangent))


def rotation(e, q):
    """The paper's R of two vectors, in float64: I - 2 r r^T + 2 q^ e^^T."""
    e, q = (np.float64(v) / np.linalg.norm(np.float64(v)) for v in (e, q))
    r = (e + q) / np.linalg.norm(e + q)
    return np.eye(len(e)) - 2 * np.outer(r, r) + 2 * np.outer(q, e)


def length(vectors):
    return np.linalg.norm(np.float64(vectors), axis=-1)


def cosine(a, b):
    return (np.float64(a) * b).sum(-1) / (length(a) * length(b))


@pytest.mark.parametrize("shape", SHAPES)
def test_straight_through_is_the_identity_to_gradients(shape):
    latents, codes, cotangent = (normal(*shape, seed=seed) for seed in range(3))
    value, to_latents, to_codes = pull_back(straight_through, latents, codes, cotangent)
    np.testing.assert_allclose(value, codes, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(to_latents, cotangent)
    np.testing.assert_array_equal(to_codes, 0)


@pytest.mark.parametrize(("shape", "jit"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)])
def test_rotation_is_that_of_the_explicit_matrix(shape, jit):
    latents, codes, cotangent = (normal(*shape, seed=seed) for seed in range(3))
    value, to_latents, to_codes = pull_back(rotation_trick, latents, codes, cotangent, jit)
    np.testing.assert_array_equal(value, codes)
    np.testing.assert_array_equal(to_codes, 0)
    rows = (np.reshape(x, (-1, shape[-1])) for x in (latents, codes, cotangent, to_latents))
    for e, q, g, found in zip(*rows, strict=True):
        scaled = length(q) / length(e) * rotation(e, q)
        np.testing.assert_allclose(scaled @ e, q, rtol=1e-5, atol=1e-5)  # the matrix is the right one
        np.testing.assert_allclose(found, scaled.T @ g, rtol=1e-4, atol=1e-5)


def test_rotation_keeps_the_angle_and_rescales_the_length():
    """What sets it apart from straight-through: the gradient stands to the latent as it stood to the code."""
    latents, codes, cotangent = (normal(500, 8, seed=seed) for seed in range(3))
    _, found, _ = pull_back(rotation_trick, latents, codes, cotangent)
    np.testing.assert_allclose(length(found), length(codes) / length(latents) * length(cotangent), rtol=1e-4)
    np.testing.assert_allclose(cosine(found, latents), cosine(cotangent, codes), atol=1e-4)
    assert np.abs(cosine(cotangent, latents) - cosine(cotangent, codes)).max() > 0.5


def test_a_latent_on_its_code_gets_the_gradient_unchanged():
    latents, cotangent = normal(20, 8), normal(20, 8, seed=1)
    _, found, _ = pull_back(rotation_trick, latents, latents, cotangent)
    np.testing.assert_allclose(found, cotangent, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apart", [0, 1e-8, OPPOSITE / 2, OPPOSITE, 2 * OPPOSITE, 1e-2])
def test_opposite_vectors_still_keep_angle_and_length(apart):
    """There the paper's r is 0 / 0: without the guard, a NaN or a gradient of any length."""
    codes, cotangent = normal(100, 8), normal(100, 8, seed=1)
    latents = -2 * codes + np.float32(apart) * normal(100, 8, seed=2)
    value, found, _ = pull_back(rotation_trick, latents, codes, cotangent)
    np.testing.assert_array_equal(value, codes)
    np.testing.assert_allclose(length(found), length(codes) / length(latents) * length(cotangent), rtol=3e-3)
    np.testing.assert_allclose(cosine(found, latents), cosine(cotangent, codes), atol=3e-3)


@pytest.mark.parametrize("which", ["latent", "code", "both"])
def test_a_zero_vector_lets_the_gradient_straight_through(which):
    latents, codes, cotangent = (normal(5, 4, seed=seed) for seed in range(3))
    latents[2], codes[2] = latents[2] * (which == "code"), codes[2] * (which == "latent")
    value, found, _ = pull_back(rotation_trick, latents, codes, cotangent)
    np.testing.assert_array_equal(value, codes)
    np.testing.assert_array_equal(found[2], cotangent[2])
    assert np.isfinite(found).all()
    assert jnp.all(found[[0, 1, 3, 4]] != cotangent[[0, 1, 3, 4]])
