"""The prior's training: its masks, and what it learns of toys whose entropy is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.config import ModelConfig, PriorConfig
from vqvae_jax.models.prior import PASSES, coding_order
from vqvae_jax.training.prior_step import (
    Grids,
    create_prior_state,
    draw_known,
    draw_present,
    make_prior_eval_step,
    make_prior_train_step,
)
from vqvae_jax.training.step import replicate, split_over_devices


def test_masks_are_random_or_of_the_coding_order():
    order = coding_order(8, 6)
    keys = jax.random.split(jax.random.key(0), 2000)
    known, weights = map(np.asarray, jax.jit(jax.vmap(lambda key: draw_known(key, order)))(keys))
    of_order = [(known == (order < number)).all(axis=(1, 2)) for number in range(PASSES)]
    assert 0.70 < np.any(of_order, axis=0).mean() < 0.85
    assert np.mean(of_order[12]) > np.mean(of_order[8]) > 0
    assert 0.1 < known.mean() < 0.9
    assert (weights[known] == 0).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1 / order.size, atol=0.4 / order.size)  # every code counts alike


def test_the_second_slice_before_is_never_shown_without_the_first():
    keys = jax.random.split(jax.random.key(0), 2000)
    shown = np.asarray(jax.vmap(lambda key: draw_present(key, jnp.array([True, True])))(keys))
    assert not (shown[:, 1] & ~shown[:, 0]).any()
    np.testing.assert_allclose(shown.mean(axis=0), [0.8, 0.64], atol=0.03)
    assert not np.asarray(draw_present(keys[0], jnp.array([False, True])))[0]


def chains(rng, count, codes, side):
    """Rows are Markov chains that stay with probability 0.7; the slice before says nothing. And bits a code.

    Codes of one pass are coded independently of each other. So the bits are those of each code given the nearest ones
    of its row that come before it in the coding order, by powers of the transition matrix.
    """
    indices = np.zeros((count, side, side), np.int32)
    indices[..., 0] = rng.integers(0, codes, (count, side))
    for column in range(1, side):
        drawn = (indices[..., column - 1] + rng.integers(1, codes, (count, side))) % codes
        indices[..., column] = np.where(rng.random((count, side)) < 0.7, indices[..., column - 1], drawn)
    transition = np.full((codes, codes), 0.3 / (codes - 1)) + (0.7 - 0.3 / (codes - 1)) * np.eye(codes)
    order, total = coding_order(side, side), 0.0
    for row, column in np.ndindex(side, side):
        known = np.flatnonzero(order[row] < order[row, column])
        joint = np.full((codes, codes, codes), codes**-3.0)  # left, itself, right
        if (known < column).any():
            joint = joint * codes * np.linalg.matrix_power(transition, column - known[known < column][-1])[..., None]
        if (known > column).any():
            joint = joint * codes * np.linalg.matrix_power(transition, known[known > column][0] - column)[None]
        given = joint / joint.sum(axis=1, keepdims=True)
        total -= (joint * np.log2(given)).sum()
    before = rng.integers(0, codes, (count, 1, side, side)).astype(np.int32)
    return indices, before, total / side**2


def copies(rng, count, codes, side):
    """Each code is that of the slice before with probability 0.8. And bits a code."""
    before = rng.integers(0, codes, (count, 1, side, side)).astype(np.int32)
    drawn = (before[:, 0] + rng.integers(1, codes, before[:, 0].shape)) % codes
    indices = np.where(rng.random(drawn.shape) < 0.8, before[:, 0], drawn).astype(np.int32)
    return indices, before, -0.8 * math.log2(0.8) - 0.2 * math.log2(0.2 / (codes - 1))


@pytest.mark.slow
@pytest.mark.parametrize(("toy", "steps"), [(chains, 600), (copies, 300)])
def test_a_toy_is_learned_to_its_entropy(toy, steps):
    codes, side, rng = 4, 16, np.random.default_rng(0)
    model = ModelConfig(image_size=(4 * side, 4 * side), num_embeddings=codes, embedding_dim=3)
    config = PriorConfig(channels=32, blocks=2, neighbours=1, learning_rate=4e-3)
    state = replicate(create_prior_state(config, model, jnp.eye(codes, 3), steps))
    step = make_prior_train_step(config, model)

    def grids(count):
        indices, before, entropy = toy(rng, count, codes, side)
        return jax.tree.map(split_over_devices, Grids(indices, before, np.ones((count, 1), bool))), entropy

    for _ in range(steps):
        state, _ = step(state, grids(16)[0])
    unseen, entropy = grids(128)
    evaluate = make_prior_eval_step(config, model)
    bits = [np.asarray(evaluate({"params": state.params}, unseen, np.int32(number))) for number in range(PASSES)]
    assert np.sum(bits) / (128 * side**2) == pytest.approx(entropy, rel=0.03)
