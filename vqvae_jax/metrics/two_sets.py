"""Two sets compared: samples with real images by features, scores of one kind with those of another."""

import numpy as np


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared kernel distance (MMD) of two sets of features: about 0 where both are drawn alike, no unit.

    The unbiased estimate with the kernel (x·y / D + 1)^3, which is KID (Bińkowski et al. 2018, arXiv:1801.01401):
    mean k(a, a') + mean k(b, b') - 2 mean k(a, b), a' and b' being others than a and b. It may be negative.

    Args:
      a, b: [N, D] and [M, D], computed in float64.

    Raises:
      ValueError: the widths differ, or a set has fewer than two rows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected two sets [N, D] of at least two features, got {a.shape} and {b.shape}")

    def within(x: np.ndarray) -> float:
        kernel = _kernel(x, x)
        return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * _kernel(a, b).mean())


def roc_area(clean: np.ndarray, altered: np.ndarray) -> float:
    """Area under the ROC curve of a score: the chance that an altered one's is above a clean one's, ties by half.

    0.5 tells nothing apart, 1 everything. Equal to the Mann-Whitney U over the number of pairs.

    Args:
      clean, altered: scores [N] and [M].
    """
    ordered = np.sort(np.asarray(clean, np.float64))
    below, up_to = (np.searchsorted(ordered, altered, side=side) for side in ("left", "right"))
    return float(np.mean(below + up_to) / (2 * len(ordered)))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3
