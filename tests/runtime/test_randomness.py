"""Every draw has a stream of its own, fixed by the seed."""

import itertools

import jax
import numpy as np
import pytest

from vqvae_jax.config import LARGEST_SEED
from vqvae_jax.runtime.randomness import Purpose, integer_for, key_for

SEEDS = (0, 1, LARGEST_SEED)


def drawn(*arguments):
    """What a key gives, as a value that tells keys apart."""
    return tuple(np.asarray(jax.random.bits(key_for(*arguments), (4,))).tolist())


def test_no_two_purposes_seeds_or_steps_share_a_stream():
    """Steps are those where two purposes would meet if their numbers were added up, and some far on."""
    steps = (*range(len(Purpose) + 1), 1000, 2**31 - 1)
    found = [drawn(*each) for each in itertools.product(SEEDS, Purpose, steps)]
    assert len(set(found)) == len(found) == len(SEEDS) * len(Purpose) * len(steps)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_purpose_and_step_give_the_same_key(seed):
    key = key_for(seed, Purpose.CODEBOOK, 7)
    assert key == key_for(seed, Purpose.CODEBOOK, 7)
    assert jax.jit(key_for, static_argnums=(0, 1))(seed, Purpose.CODEBOOK, 7) == key  # as the training step has it
    assert key_for(seed, Purpose.CODEBOOK) == key_for(seed, Purpose.CODEBOOK, 0)


@pytest.mark.parametrize("purpose", Purpose)
def test_integers_are_seeds_of_32_bits_and_differ(purpose):
    found = [integer_for(seed, purpose) for seed in range(50)]
    assert found == [integer_for(seed, purpose) for seed in range(50)]
    assert all(type(each) is int and 0 <= each < 2**32 for each in found)
    assert max(found) >= 2**31
    assert len(
        {*found, *(integer_for(seed, other) for seed in range(50) for other in Purpose if other != purpose)}
    ) == 50 * len(Purpose)
