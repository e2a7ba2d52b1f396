"""Entropy coding of code indices: adaptive models of each code's neighbours, in a range coder."""

import warnings
import zlib
from collections.abc import Callable, Iterator

import constriction
import numpy as np

from vqvae_jax.errors import DataError

MAX_CODES = 1 << 16
MAX_CLASSES = 16
PROBABILITY_BITS = 24
"""Precision of probabilities in constriction's default coders."""

_MAX_COUNTS = 1 << 20
"""Most counts, K * classes**2: bounds what a reader allocates."""
_SEEN_WEIGHT = 16
"""How much more a code's probability, over all contexts, owes to being seen once than to existing."""
_PRIOR_WEIGHT = 64
"""How many codes seen in a context weigh as much as what was seen in all contexts."""
_PRIOR_BITS = 16
_HALVE_AT = 1 << 20
"""Counts are halved here, so that the products below stay under 2**63."""
_FIRST_BLOCK, _LONGEST_BLOCK = 16, 1 << 16
_SPECTRAL_DIMENSIONS = 6

# The four sublattices of a grid in the order they are coded, and the offset of the neighbour that is known by then
# (its mirror image is known too, where it lies inside). The first has none: the previous grid stands in.
_PASSES = (((0, 0), (0, 0)), ((1, 1), (-1, -1)), ((0, 1), (0, -1)), ((1, 0), (-1, 0)))

_Step = Callable[[constriction.stream.model.Categorical, np.ndarray], np.ndarray]


def encode(indices: np.ndarray, num_embeddings: int) -> tuple[bytes, np.ndarray]:
    """Indices int [N, h, w] in [0, num_embeddings) to bytes, and the class uint8 [num_embeddings] of each code.

    A code is coded given the classes of two neighbours, adaptively: a model counts what was coded before. Classes
    group codes that have the same neighbours (regularised spectral clustering, Qin & Rohe 2013, arXiv:1309.4111);
    where they do not pay for their table, as in a single small slice, all codes are of class 0.

    The bytes are the same on every machine, and so is what is decoded from them: all counts are integers, and
    constriction is given integers that sum to 2**24 - num_embeddings, from which it computes without rounding.
    """
    one_class = np.zeros(num_embeddings, np.uint8)
    best = _encode(indices, one_class), one_class
    classes = _cluster(indices, num_embeddings)
    if classes.any():
        payload = _encode(indices, classes)
        if len(payload) + len(zlib.compress(classes_to_text(classes).encode(), 9)) < len(best[0]):
            best = payload, classes
    return best


def decode(payload: bytes, shape: tuple[int, int, int], classes: np.ndarray) -> np.ndarray:
    """Inverse of ``encode``: indices int32 of ``shape``.

    Raises:
      DataError: the bytes are not what ``encode`` makes for this shape and these classes.
    """
    if len(payload) % 4:
        raise DataError(f"holds {len(payload)} bytes of codes; expected a multiple of 4")
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32))
    indices = np.zeros(shape, np.int32)
    try:
        _visit(indices, classes, lambda model, symbols: decoder.decode(model, symbols.size))
    except (AssertionError, ValueError) as error:  # how constriction reports words no encoder writes
        raise DataError("holds damaged codes") from error
    if not decoder.maybe_exhausted():
        raise DataError("holds damaged codes (some are left over)")
    return indices


def largest_number_of_classes(num_embeddings: int) -> int:
    """How many classes ``num_embeddings`` codes may have."""
    return min(MAX_CLASSES, int((_MAX_COUNTS // num_embeddings) ** 0.5))


def classes_to_text(classes: np.ndarray) -> str:
    """One hexadecimal digit a code; nothing if all are of class 0."""
    return "".join(f"{label:x}" for label in classes) if classes.any() else ""


def classes_from_text(text: str, num_embeddings: int) -> np.ndarray:
    """Inverse of ``classes_to_text``. Raises DataError if it does not fit ``num_embeddings``."""
    if not text:
        return np.zeros(num_embeddings, np.uint8)
    largest = largest_number_of_classes(num_embeddings)
    digits = "0123456789abcdef"[:largest]
    if len(text) != num_embeddings or not set(text) <= set(digits):
        raise DataError(f"has a damaged header (expected {num_embeddings} classes below {largest})")
    return np.array([int(digit, 16) for digit in text], np.uint8)


def _encode(indices: np.ndarray, classes: np.ndarray) -> bytes:
    encoder = constriction.stream.queue.RangeEncoder()

    def step(model: constriction.stream.model.Categorical, symbols: np.ndarray) -> np.ndarray:
        encoder.encode(symbols, model)
        return symbols

    _visit(indices.astype(np.int32), classes, step)
    return encoder.get_compressed().astype("<u4").tobytes()


def _visit(indices: np.ndarray, classes: np.ndarray, step: _Step) -> None:
    """Replaces ``indices`` [N, h, w] in place with what ``step`` gives for them, in the order of the format."""
    counts, coded = _Counts(len(classes)), 0
    previous = np.zeros_like(indices[0])
    for grid in indices:
        for (top, left), offset in _PASSES:
            rows, columns = (axis.ravel() for axis in np.mgrid[top : grid.shape[0] : 2, left : grid.shape[1] : 2])
            contexts = _contexts(classes[previous if offset == (0, 0) else grid], rows, columns, offset)
            for block in _blocks(contexts.size, coded):
                for context in np.unique(contexts[block]):
                    here = block.start + np.flatnonzero(contexts[block] == context)
                    place = rows[here], columns[here]
                    grid[place] = step(counts.model(context), grid[place])
                    counts.add(context, grid[place])
            coded += contexts.size
        previous = grid


def _contexts(labels: np.ndarray, rows: np.ndarray, columns: np.ndarray, offset: tuple[int, int]) -> np.ndarray:
    """The classes of two neighbours, as one number: the one at ``offset``, and its mirror image or again itself."""
    first = labels[rows + offset[0], columns + offset[1]]
    mirror = rows - offset[0], columns - offset[1]
    inside = (mirror[0] < labels.shape[0]) & (mirror[1] < labels.shape[1])
    second = first.copy()
    second[inside] = labels[mirror[0][inside], mirror[1][inside]]
    return first.astype(np.int64) * MAX_CLASSES + second


def _blocks(size: int, coded: int) -> Iterator[slice]:
    """Cuts a pass into blocks as long as all before them: the first codes, of which nothing is known, are few."""
    start = 0
    while start < size:
        stop = min(start + min(coded + start + _FIRST_BLOCK, _LONGEST_BLOCK), size)
        yield slice(start, stop)
        start = stop


class _Counts:
    """How often each code was seen, in all contexts and in each."""

    def __init__(self, num_embeddings: int):
        self.everywhere = np.zeros(num_embeddings, np.int64)
        self.contexts: dict[int, np.ndarray] = {}
        self.free = (1 << PROBABILITY_BITS) - num_embeddings

    def model(self, context: int) -> constriction.stream.model.Categorical:
        """Code i gets probability (1 + f_i) / 2**24, where constriction adds the 1 to the f_i made here."""
        seen = _SEEN_WEIGHT * self.everywhere + 1
        weights = _PRIOR_WEIGHT * ((seen << _PRIOR_BITS) // seen.sum())
        if context in self.contexts:
            weights += self.contexts[context].astype(np.int64) << _PRIOR_BITS
        cumulative = np.cumsum(weights)
        frequencies = np.diff(cumulative * self.free // cumulative[-1], prepend=0)
        return constriction.stream.model.Categorical(frequencies.astype(np.float64), perfect=False)

    def add(self, context: int, symbols: np.ndarray) -> None:
        """Counts codes seen in a context."""
        new = np.bincount(symbols, minlength=self.everywhere.size)
        self.everywhere += new
        table = self.contexts.setdefault(context, np.zeros(new.size, np.int32))
        table += new.astype(np.int32)
        if self.everywhere.sum() >= _HALVE_AT:
            for counts in (self.everywhere, *self.contexts.values()):
                np.right_shift(counts, 1, out=counts)


def _cluster(indices: np.ndarray, num_embeddings: int) -> np.ndarray:
    """Classes uint8 [num_embeddings] of codes with like neighbours; all 0 where too few kinds of codes occur."""
    # Half a second to import, and needed only here.
    from scipy.cluster.vq import kmeans2  # noqa: PLC0415
    from scipy.sparse import coo_array, diags_array  # noqa: PLC0415
    from scipy.sparse.linalg import ArpackError, eigsh  # noqa: PLC0415

    classes = np.zeros(num_embeddings, np.uint8)
    used, kinds = np.unique(indices, return_inverse=True)
    kinds = kinds.reshape(indices.shape)
    number = min(largest_number_of_classes(num_embeddings), used.size // 2)
    if number < 2 or used.size <= _SPECTRAL_DIMENSIONS + 1:
        return classes
    first = np.concatenate([kinds[1:].ravel(), kinds[:, 1:].ravel(), kinds[:, :, 1:].ravel()])
    second = np.concatenate([kinds[:-1].ravel(), kinds[:, :-1].ravel(), kinds[:, :, :-1].ravel()])
    pairs = coo_array((np.ones(first.size), (first, second)), shape=(used.size, used.size)).tocsr()
    pairs = pairs + pairs.T
    degrees = pairs.sum(axis=1)
    degrees = degrees + degrees.mean()
    scale = diags_array(degrees**-0.5)
    try:
        values, vectors = eigsh(scale @ pairs @ scale, k=_SPECTRAL_DIMENSIONS, which="LA", v0=np.ones(used.size))
    except ArpackError:  # it does not always converge, and classes only save bits
        return classes
    positions = vectors * values / np.sqrt(degrees)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty class does no harm
        classes[used] = kmeans2(positions / positions.std(), number, minit="++", seed=0)[1]
    return classes
