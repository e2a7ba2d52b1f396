"""Entropy coding: exact, near the entropy, and readable from its description alone."""

import itertools

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from vqvae_jax.coding import entropy
from vqvae_jax.errors import DataError

SHAPES = [(1, 1, 1), (1, 1, 9), (1, 9, 1), (1, 8, 6), (4, 7, 5), (2, 33, 40)]

GOLDEN = "a475141701fd7779eec6831205f61144d6a268cd5040d007071228bba595813f1f809bcb"
"""Codes as version 1 of the format has them, for ever."""


def smooth_codes(rng, num_embeddings, shape=(8, 64, 64)):
    """Codes of a smooth random field: neighbours are alike, numbers mean nothing."""
    field = gaussian_filter(rng.normal(size=shape), 2, mode="wrap")
    levels = np.quantile(field, np.linspace(0, 1, num_embeddings + 1)[1:-1])
    return rng.permutation(num_embeddings)[np.searchsorted(levels, field)].astype(np.int32)


def read_as_documented(payload, shape, classes):
    """A reader made from docs/vqz.md alone: Python's integers, no library, one code at a time."""
    words = iter([int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)])
    mask, size = 2**64 - 1, len(classes)
    low, width, point = 0, mask, next(words, 0) << 32 | next(words, 0)
    everywhere, contexts, done = [0] * size, {}, 0
    before = {(y, x): 0 for y in range(shape[1]) for x in range(shape[2])}
    result = []

    def decode_one(m):
        nonlocal low, width, point
        n_total = sum(16 * n + 1 for n in everywhere)
        u = [64 * (((16 * n + 1) * 2**16) // n_total) + seen * 2**16 for n, seen in zip(everywhere, m, strict=True)]
        right = [total * (2**24 - size) // sum(u) + i + 1 for i, total in enumerate(itertools.accumulate(u))]
        scale = width >> 24
        q = ((point - low) & mask) // scale
        code = next(i for i in range(size) if q < right[i])
        left = right[code - 1] if code else 0
        low, width = (low + scale * left) & mask, scale * (right[code] - left)
        if width < 2**32:
            low, width, point = low << 32 & mask, width << 32, (point << 32 & mask) | next(words, 0)
        return code

    for _ in range(shape[0]):
        grid = {}
        for top, start, dy, dx in ((0, 0, None, None), (1, 1, -1, -1), (0, 1, 0, -1), (1, 0, -1, 0)):
            places = [(y, x) for y in range(top, shape[1], 2) for x in range(start, shape[2], 2)]
            context = {}
            for y, x in places:
                first = before[y, x] if dy is None else grid[y + dy, x + dx]
                second = first if dy is None else grid.get((y - dy, x - dx), first)
                context[y, x] = 16 * int(classes[first]) + int(classes[second])
            while places:
                block, places = places[: done + 16], places[done + 16 :]
                for c in sorted({context[place] for place in block}):
                    m = contexts.setdefault(c, [0] * size)
                    here = [place for place in block if context[place] == c]
                    for place in here:
                        grid[place] = decode_one(m)
                    for place in here:
                        m[grid[place]] += 1
                        everywhere[grid[place]] += 1
                done += len(block)
        before = grid
        result.append([[grid[y, x] for x in range(shape[2])] for y in range(shape[1])])
    return np.array(result)


@pytest.mark.parametrize("num_embeddings", [2, 3, 1000, 2**16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back(shape, num_embeddings):
    rng = np.random.default_rng(0)
    for codes in (
        rng.integers(0, num_embeddings, shape),
        np.full(shape, num_embeddings - 1),
        np.minimum(rng.geometric(0.2, shape), num_embeddings - 1),
    ):
        payload, classes = entropy.encode(codes, num_embeddings)
        decoded = entropy.decode(payload, shape, classes)
        np.testing.assert_array_equal(decoded, codes)
        assert decoded.dtype == np.int32


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 8), (3, 16, 14)])
def test_the_description_is_enough_to_read_them(shape):
    rng = np.random.default_rng(1)
    codes = smooth_codes(rng, 12, shape)
    classes = rng.integers(0, 4, 12).astype(np.uint8)
    payload = entropy._encode(codes, classes)
    np.testing.assert_array_equal(read_as_documented(payload, shape, classes), codes)


def test_what_was_written_before_is_read():
    payload = bytes.fromhex(GOLDEN)
    y, x = np.mgrid[:6, :5]
    codes = np.stack([(y * 3 + x * x + n) % 7 for n in range(3)])
    classes = np.arange(7, dtype=np.uint8) // 2
    np.testing.assert_array_equal(entropy.decode(payload, codes.shape, classes), codes)
    assert entropy._encode(codes, classes) == payload


def test_independent_codes_cost_their_entropy():
    probabilities = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.015, 0.005])
    codes = np.random.default_rng(2).choice(8, size=(10, 64, 64), p=probabilities)
    bits = -(probabilities * np.log2(probabilities)).sum() * codes.size
    payload, _ = entropy.encode(codes, 8)
    assert 0.99 * bits < 8 * len(payload) < 1.02 * bits


def test_equal_codes_cost_next_to_nothing():
    payload, _ = entropy.encode(np.full((20, 64, 64), 3), 1024)
    assert len(payload) < 100


def test_neighbours_are_made_use_of():
    codes = smooth_codes(np.random.default_rng(3), 32)
    share = np.bincount(codes.ravel()) / codes.size
    payload, classes = entropy.encode(codes, 32)
    assert len(set(classes)) == 16
    assert 8 * len(payload) < 0.75 * codes.size * -(share * np.log2(share)).sum()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("period", [1, 2, 8, 40])
def test_regular_patterns_have_classes_or_none_without_a_word(period):
    y, x = np.mgrid[:24, :24]
    codes = np.stack([(y // period * 3 + x // period * 5) % 40, np.where(x < 12, y, 39 - y)])
    payload, classes = entropy.encode(codes, 64)
    np.testing.assert_array_equal(entropy.decode(payload, codes.shape, classes), codes)


def test_many_codes_keep_the_counts_in_bounds():
    codes = np.random.default_rng(4).integers(0, 2, (3, 800, 800))  # counts are halved on the way
    payload, classes = entropy.encode(codes, 2)
    np.testing.assert_array_equal(entropy.decode(payload, codes.shape, classes), codes)


@pytest.mark.parametrize("change", [lambda words: words[:-1], lambda words: words + bytes(range(1, 41))])
def test_damaged_codes_are_refused(change):
    codes = np.random.default_rng(5).integers(0, 100, (2, 8, 8))
    payload, classes = entropy.encode(codes, 100)
    with pytest.raises(DataError, match="codes"):
        entropy.decode(change(payload), codes.shape, classes)


def test_no_words_at_all_read_as_zeros():
    assert entropy.decode(b"", (2, 8, 8), np.zeros(100, np.uint8)).max() == 0


@pytest.mark.parametrize("num_embeddings", [2, 4096, 2**16])
def test_classes_as_text(num_embeddings):
    largest = entropy.largest_number_of_classes(num_embeddings)
    classes = (np.arange(num_embeddings) % largest).astype(np.uint8)
    np.testing.assert_array_equal(entropy.classes_from_text(entropy.classes_to_text(classes), num_embeddings), classes)
    for text in ("0" * (num_embeddings - 1), "0" * (num_embeddings - 1) + "g", "0" * (num_embeddings - 1) + "٣"):
        with pytest.raises(DataError, match="classes"):
            entropy.classes_from_text(text, num_embeddings)
