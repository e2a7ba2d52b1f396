"""Coding by a prior: what comes back, what it costs, and what a damaged byte spoils."""

import math
from fractions import Fraction

import jax
import numpy as np
import pytest

from vqvae_jax.coding import prior_coder
from vqvae_jax.models.prior import Prior, coding_order, init_prior
from vqvae_jax.models.prior_integers import PriorProgram, to_integers

CODES = 24


@pytest.fixture(scope="module")
def program():
    prior = Prior(num_embeddings=CODES, channels=16, blocks=1, neighbours=2, grid=(8, 4))
    variables = init_prior(prior, jax.random.normal(jax.random.key(0), (CODES, 5)), jax.random.key(1))
    return PriorProgram(to_integers(prior, jax.tree.map(lambda leaf: leaf * 2, variables)))


def slices(count, height=5, width=7, seed=0):
    return np.random.default_rng(seed).integers(0, CODES, (count, height, width)).astype(np.int32)


@pytest.mark.parametrize("count", [1, 16, 37])
def test_codes_come_back(program, count):
    indices = slices(count)
    payloads = prior_coder.encode(indices, program)
    assert len(payloads) == math.ceil(count / prior_coder.GROUP) == prior_coder.number_of_groups(count)
    found, lost = prior_coder.decode(payloads, indices.shape, program)
    assert lost == [] and found.dtype == np.int32
    np.testing.assert_array_equal(found, indices)


def test_the_bytes_are_the_bits(program):
    indices = slices(20)
    bits = prior_coder.bits(indices, program)
    for start, payload in zip((0, 16), prior_coder.encode(indices, program), strict=True):
        expected = bits[start : start + 16].sum()
        assert expected <= 8 * len(payload) < expected + 64


def test_bits_are_the_conditional_bits_pass_by_pass(program):
    """By hand: the second slice's, given the first, each code by the softmax of its own logits."""
    indices = slices(2)
    order = coding_order(5, 7)
    before = np.zeros((1, 2, 5, 7), np.int32)
    before[0, 0] = indices[0]
    context = program.context(before, np.array([[True, False]]))
    total = 0.0
    for row, column in np.ndindex(5, 7):
        known = order < order[row, column]
        hidden = np.where(known, indices[1], -5)  # what is not known cannot matter
        logits = program.logits(hidden[None], known[None], context)[0, row, column] / 32
        total -= math.log2(np.exp(logits - logits.max())[indices[1, row, column]] / np.exp(logits - logits.max()).sum())
    assert prior_coder.bits(indices, program)[1].sum() == pytest.approx(total, rel=1e-3)


def test_frequencies_sum_to_a_power_of_two_and_are_the_softmax():
    logits = np.random.default_rng(0).integers(-500, 500, (50, CODES))
    found = prior_coder.frequencies(logits)
    assert found.min() >= 0
    assert ((found + 1).sum(axis=1) == 1 << 24).all()
    wanted = np.exp((logits - logits.max(axis=1, keepdims=True)) / 32)
    wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose((found + 1) / 2**24, wanted, rtol=1e-5, atol=2e-6)


def test_the_exponentials_are_the_nearest_integers():
    """By a series of exact fractions."""
    table = prior_coder.exponentials()
    assert table[-1] == 0 < table[-2]
    for number in (1, 31, 32, 200, len(table) - 2):
        x, term, total = Fraction(number, 32), Fraction(1), Fraction(0)
        for index in range(1, 120):
            total += term
            term = term * x / index
        assert table[number] == round(2**20 / total)


def test_a_damaged_group_spoils_no_other(program):
    indices = slices(40)
    payloads = prior_coder.encode(indices, program)
    payloads[1] = None
    found, lost = prior_coder.decode(payloads, indices.shape, program)
    assert lost == [1]
    np.testing.assert_array_equal(np.delete(found, range(16, 32), 0), np.delete(indices, range(16, 32), 0))


def test_bytes_that_no_encoder_makes_are_told(program):
    indices = slices(16)
    (payload,) = prior_coder.encode(indices, program)
    for other in (payload + bytes(4), payload[:-3], payload * 2):
        assert prior_coder.decode([other], indices.shape, program)[1] in ([0], [])
    assert prior_coder.decode([payload * 2], indices.shape, program)[1] == [0]
