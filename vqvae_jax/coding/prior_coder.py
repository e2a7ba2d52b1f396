"""Entropy coding of code indices by a prior that runs in integers, given the slices before (docs/vqz.md)."""

import decimal
import functools
from collections.abc import Callable, Sequence

import constriction
import numpy as np

from vqvae_jax.coding.entropy import PROBABILITY_BITS
from vqvae_jax.models import rounding
from vqvae_jax.models.prior import coding_order
from vqvae_jax.models.prior_integers import PriorProgram

GROUP = 16
"""Slices that are coded one given the other; the first of them alone. A damaged byte spoils no other group."""
EXPONENTIAL_BITS = 20
"""Fractional bits of the exponentials."""
_AT_ONCE = 8
"""Groups coded side by side."""


@functools.cache
def exponentials() -> np.ndarray:
    """int64 [L]: exp(-i / 32) in units of 2**-20, to the nearest, until it is 0.

    By the decimal module, whose results the standard for decimal arithmetic prescribes to the last digit.
    """
    context = decimal.Context(prec=50)
    scale = decimal.Decimal(1 << EXPONENTIAL_BITS)
    found = []
    while not found or found[-1]:
        exponent = context.divide(decimal.Decimal(-len(found)), decimal.Decimal(1 << rounding.LOGIT_BITS))
        value = context.multiply(context.exp(exponent), scale)
        found.append(int(value.to_integral_value(decimal.ROUND_HALF_EVEN)))
    return np.array(found, np.int64)


def frequencies(logits: np.ndarray) -> np.ndarray:
    """Integers int64 [n, K] that sum to 2**24 - K, of logits int [n, K] in units of 1/32.

    Code i has probability (1 + its number) / 2**24.
    """
    table = exponentials()
    below = logits.max(axis=1, keepdims=True).astype(np.int64) - logits
    cumulative = np.cumsum(table[np.minimum(below, len(table) - 1)], axis=1)
    free = (1 << PROBABILITY_BITS) - logits.shape[1]
    return np.diff(cumulative * free // cumulative[:, -1:], axis=1, prepend=0)


def bits(indices: np.ndarray, program: PriorProgram, *, alone: bool = False) -> np.ndarray:
    """Bits float64 [N, h, w] that the coder spends on each code of consecutive slices int [N, h, w].

    With ``alone``, on each slice without those before.
    """
    found = np.zeros(indices.shape)
    size = 1 if alone else GROUP

    def step(group: int, number: int, place: tuple, model: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        own = np.take_along_axis(model, symbols[:, None].astype(np.int64), axis=1)[:, 0]
        found[size * group + number][place] = PROBABILITY_BITS - np.log2(own + 1.0)
        return symbols

    _visit(_grouped(indices, size), program, step)
    return found


def encode(indices: np.ndarray, program: PriorProgram) -> list[bytes]:
    """Consecutive slices' codes int [N, h, w] in [0, K) to the bytes of each group of GROUP of them."""
    groups = _grouped(indices)
    encoders = [constriction.stream.queue.RangeEncoder() for _ in groups]

    def step(group: int, number: int, place: tuple, model: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        del number, place
        encoders[group].encode(symbols, _family(), model.astype(np.float64))
        return symbols

    _visit(groups, program, step)
    return [encoder.get_compressed().astype("<u4").tobytes() for encoder in encoders]


def decode(
    payloads: Sequence[bytes | None], shape: tuple[int, int, int], program: PriorProgram
) -> tuple[np.ndarray, list[int]]:
    """Inverse of ``encode``: indices int32 of ``shape``, and the numbers of groups that are lost.

    A group is lost where it is None, or holds what ``encode`` does not make. Its codes are 0.
    """
    indices = np.zeros(shape, np.int32)
    groups = _grouped(indices)
    lost = {number for number, payload in enumerate(payloads) if payload is None or len(payload) % 4}
    decoders = {
        number: constriction.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))
        for number, payload in enumerate(payloads)
        if number not in lost
    }

    def step(group: int, number: int, place: tuple, model: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        del number, place
        if group not in lost:
            try:
                return decoders[group].decode(_family(), model.astype(np.float64))
            except (AssertionError, ValueError):  # how constriction reports words no encoder writes
                lost.add(group)
        return symbols

    _visit(groups, program, step)
    lost |= {number for number, decoder in decoders.items() if not decoder.maybe_exhausted()}
    for number in lost:
        groups[number][:] = 0
    return indices, sorted(lost)


def number_of_groups(slices: int) -> int:
    """How many groups so many slices are coded in."""
    return -(-slices // GROUP)


def _family() -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(perfect=False)


def _grouped(indices: np.ndarray, size: int = GROUP) -> list[np.ndarray]:
    """Views of up to ``size`` slices each."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _visit(groups: list[np.ndarray], program: PriorProgram, step: Callable[..., np.ndarray]) -> None:
    """Replaces each group's codes in place with what ``step`` gives for them, in the order of the format.

    ``step`` takes the group's number, the slice's in the group, the place of the codes in its grid, their
    frequencies [n, K] and what is there now [n].
    """
    for start in range(0, len(groups), _AT_ONCE):
        some = list(range(start, min(start + _AT_ONCE, len(groups))))
        for number in range(max(len(groups[group]) for group in some)):
            _visit_slices(
                {group: groups[group] for group in some if number < len(groups[group])}, number, program, step
            )


def _visit_slices(
    groups: dict[int, np.ndarray], number: int, program: PriorProgram, step: Callable[..., np.ndarray]
) -> None:
    """`_visit` of the slice of this number in each of some groups."""
    grids = np.stack([group[number] for group in groups.values()]).astype(np.int32)
    neighbours = program.prior.neighbours
    before = np.zeros((len(grids), neighbours, *grids.shape[1:]), np.int32)
    present = np.arange(neighbours) < number
    for offset in range(min(number, neighbours)):
        before[:, offset] = np.stack([group[number - 1 - offset] for group in groups.values()])
    context = program.context(before, np.broadcast_to(present, before.shape[:2]))
    order = coding_order(*grids.shape[1:])
    for each in np.unique(order):
        logits = program.logits(grids, np.broadcast_to(order < each, grids.shape), context)
        place = np.nonzero(order == each)
        for row, group in enumerate(groups):
            symbols = step(group, number, place, frequencies(logits[row][place]), grids[row][place])
            grids[row][place] = symbols
    for row, group in enumerate(groups.values()):
        group[number] = grids[row]
