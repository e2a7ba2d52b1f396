"""Every random draw of a run comes from its one seed, through one function."""

import enum

import jax


class Purpose(enum.IntEnum):
    """What is drawn. No two purposes share a stream."""

    PARAMETERS = 0
    ORDER = 1
    CODEBOOK = 2
    AUGMENTATION = 3
    PRIOR_PARAMETERS = 4
    PRIOR_ORDER = 5
    PRIOR_AUGMENTATION = 6
    MASKS = 7
    SAMPLES = 8


def key_for(seed: int, purpose: Purpose, step: int | jax.Array = 0) -> jax.Array:
    """The random key of a purpose at a step: ``seed``, with the purpose and the step folded in."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def integer_for(seed: int, purpose: Purpose) -> int:
    """A seed in [0, 2**32) for a library that has random numbers of its own."""
    return int(jax.random.bits(key_for(seed, purpose)))
