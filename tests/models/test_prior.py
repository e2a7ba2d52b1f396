"""The prior: what it may look at, the coding order, and grids of any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models import rounding
from vqvae_jax.models.prior import PASSES, Prior, coding_order, init_prior, nearest_of

CODES = 11
PRIOR = Prior(num_embeddings=CODES, channels=8, blocks=1, neighbours=2, grid=(6, 4))


@functools.cache
def variables():
    codebook = jax.random.normal(jax.random.key(0), (CODES, 3))
    return jax.tree.map(lambda leaf: 1.5 * leaf + 0.05, init_prior(PRIOR, codebook, jax.random.key(1)))


def given(height=6, width=4, count=2):
    rng = np.random.default_rng(0)
    indices, known = rng.integers(0, CODES, (count, height, width)), rng.random((count, height, width)) < 0.5
    return indices, known, rng.integers(0, CODES, (count, 2, height, width)), np.array([[1, 0], [1, 1]][:count], bool)


def logits(*arguments):
    return np.asarray(PRIOR.apply(variables(), *map(jnp.asarray, arguments)))


@pytest.mark.parametrize(("height", "width"), [(6, 4), (1, 1), (3, 9)])
def test_every_grid_has_a_distribution_for_each_place(height, width):
    found = jax.nn.softmax(logits(*given(height, width)))
    assert found.shape == (2, height, width, CODES)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)


def test_what_is_not_known_or_not_there_does_not_matter():
    indices, known, before, present = given()
    expected = logits(indices, known, before, present)
    hidden = np.where(known, indices, (indices + 3) % CODES)
    absent = np.where(present[..., None, None], before, (before + 5) % CODES)
    np.testing.assert_array_equal(logits(hidden, known, absent, present), expected)


@pytest.mark.parametrize("which", ["known", "before0", "before1", "present"])
def test_what_is_given_matters(which):
    indices, known, before, present = given()
    expected = logits(indices, known, before, present)[1]
    if which == "known":
        indices = np.where(known, (indices + 1) % CODES, indices)
    elif which == "present":
        present = ~present
    else:
        before = before.copy()
        before[:, int(which[-1])] = (before[:, int(which[-1])] + 1) % CODES
    assert np.abs(logits(indices, known, before, present)[1] - expected).max() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 32), (5, 7), (1, 1), (1, 40)])
def test_the_coding_order_reaches_every_place_once(height, width):
    order = coding_order(height, width)
    assert order.min() == 0 and order.max() < PASSES
    assert order.shape == (height, width)


def test_the_coding_order_by_hand():
    """Of two passes on each side of a position, one is coded before it: nobody is between two unknown neighbours."""
    np.testing.assert_array_equal(
        coding_order(4, 4), [[0, 12, 9, 12], [11, 10, 11, 10], [8, 12, 7, 12], [11, 10, 11, 10]]
    )
    order = coding_order(33, 33)
    for row, column in np.ndindex(order.shape):
        if order[row, column] == 12:  # the last pass
            near = [order[row + a, column + b] for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0)) if row + a in range(33)]
            assert max(near) < 12
    assert [int((order == number).sum()) for number in range(4)] == [9, 4, 6, 6]


def test_rows_of_other_grids_are_the_nearest():
    np.testing.assert_array_equal(nearest_of(6, 6), range(6))
    np.testing.assert_array_equal(nearest_of(3, 6), [1, 3, 5])
    np.testing.assert_array_equal(nearest_of(6, 3), [0, 0, 1, 1, 2, 2])


def test_codes_that_are_near_have_near_vectors_at_the_start():
    codebook = jnp.concatenate([jnp.zeros((5, 3)), jnp.ones((5, 3)), jnp.full((1, 3), 2)])
    wide = Prior(num_embeddings=CODES, channels=64, grid=(2, 2))
    table = np.asarray(init_prior(wide, codebook, jax.random.key(0))["params"]["codes_table"])
    within = np.linalg.norm(table[:5] - table[:5].mean(0), axis=1).mean()
    assert within < 0.8 * np.linalg.norm(table[:5].mean(0) - table[10])


def test_rounding_is_to_the_nearest_and_gradients_pass():
    x = jnp.array([-1.0, 0.0, 0.03, 0.05, 7.9, 9.0])
    np.testing.assert_array_equal(rounding.activation(x), [0, 0, 0, 0.0625, 7.875, 7.9375])
    slopes = jax.vmap(jax.grad(rounding.activation))(x[2:])
    np.testing.assert_array_equal(slopes, [1, 1, 1, 0])
    w = np.array([0.5, -0.9, 0.001, 0.3], np.float32)
    np.testing.assert_allclose(rounding.weights(jnp.asarray(w)), np.floor(w * 128 + 0.5) / 128)
