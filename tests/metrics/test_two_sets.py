"""Figures of samples: the kernel distance by its definition, the ROC area by counting pairs."""

import numpy as np
import pytest
from scipy import stats

from vqvae_jax import metrics


def by_definition(a, b):
    """KID as Binkowski et al. 2018 write it, a pair at a time."""

    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    within = [
        np.mean([kernel(x, y) for i, x in enumerate(group) for j, y in enumerate(group) if i != j]) for group in (a, b)
    ]
    return sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_the_kernel_distance_is_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(0.5, 1, (9, 5))
    assert metrics.kernel_distance(a, b) == pytest.approx(by_definition(a, b), rel=1e-10)
    assert metrics.kernel_distance(a, b) == pytest.approx(metrics.kernel_distance(b, a), rel=1e-10)


def test_the_kernel_distance_is_0_on_average_between_sets_of_one_kind():
    rng = np.random.default_rng(0)
    same = [metrics.kernel_distance(*rng.normal(size=(2, 30, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert metrics.kernel_distance(rng.normal(size=(30, 4)), rng.normal(1, 1, (30, 4))) > 10 * np.std(same)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((1, 4), (3, 4)), ((3,), (3,))])
def test_sets_that_cannot_be_compared_are_refused(shapes):
    with pytest.raises(ValueError, match="expected two sets"):
        metrics.kernel_distance(*map(np.zeros, shapes))


def test_the_roc_area_counts_pairs():
    rng = np.random.default_rng(0)
    clean, altered = rng.integers(0, 9, 40), rng.integers(3, 12, 30)  # with ties
    pairs = [(a > c) + (a == c) / 2 for a in altered for c in clean]
    assert metrics.roc_area(clean, altered) == pytest.approx(np.mean(pairs))
    u = stats.mannwhitneyu(altered, clean).statistic
    assert metrics.roc_area(clean, altered) == pytest.approx(u / (40 * 30))
    assert metrics.roc_area([1, 2], [3, 4]) == 1
    assert metrics.roc_area([1, 2], [1, 2]) == 0.5
