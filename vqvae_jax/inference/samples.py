"""New slices from a prior, new volumes, and given slices with a region made anew."""

import math
from collections.abc import Iterator

import numpy as np
import tqdm

from vqvae_jax.coding.encoded import EncodedImages
from vqvae_jax.errors import CheckpointError, DataError, require
from vqvae_jax.inference.trained_model import TrainedModel
from vqvae_jax.models import rounding
from vqvae_jax.models.prior import coding_order
from vqvae_jax.models.prior_integers import PriorProgram
from vqvae_jax.runtime.randomness import Purpose, integer_for

STEPS = 12
"""Steps by default; MaskGIT (Chang et al. 2022, arXiv:2202.04200) takes 8 to 12."""
SWEEPS, MOST_REDRAWN, LEAST_REDRAWN = 16, 0.3, 0.02
"""Sweeps in which codes are drawn again, and the share of them in the first sweep and after the last."""
_CODES_AT_ONCE = 2**13
"""Codes whose logits are in memory at once."""


def draw_codes(
    program: PriorProgram,
    indices: np.ndarray,
    known: np.ndarray,
    before: np.ndarray,
    present: np.ndarray,
    *,
    steps: int = STEPS,
    temperature: float = 1.0,
    rng: np.random.Generator,
    progress: bool = False,
) -> np.ndarray:
    """Grids of codes with those that are not known drawn from the prior.

    Codes are drawn in the coding order, by chance within a pass, in ``steps`` parts. The parts grow as a cosine
    schedule says: the first codes, on which all others hang, are drawn one by one or nearly so. Codes of one part do
    not know of each other. So some are drawn again, given all others, in SWEEPS sweeps (Gibbs sampling): ever fewer.

    Args:
      program: the prior.
      indices, known: int32 and bool [N, h, w]; where not known, any numbers.
      before, present: the slices before, int32 [N, neighbours, h, w], and bool [N, neighbours], which there are.
      steps: parts.
      temperature: below 1, likely codes become likelier.
      rng: of the draws.
      progress: show a progress bar where it takes long.

    Returns:
      int32 [N, h, w].
    """
    height, width = indices.shape[1:]
    found = np.array(indices, np.int32)
    at_once = max(1, _CODES_AT_ONCE // (height * width))
    starts = range(0, len(found), at_once)
    for start in tqdm.tqdm(starts, desc="Drawing", leave=False, delay=1, disable=None if progress else True):
        # A full batch each time, so that one program serves all of them.
        rows = np.minimum(np.arange(start, start + at_once), len(found) - 1)
        count = min(at_once, len(found) - start)
        grids, there = found[rows], np.array(known[rows])
        context = program.context(before[rows], present[rows])
        rank = coding_order(height, width) + rng.random(there.shape)
        rank[there] = -1.0
        places = np.argsort(np.argsort(rank.reshape(len(rows), -1), axis=1), axis=1).reshape(there.shape)
        first = there.sum(axis=(1, 2), keepdims=True)
        unknown = height * width - first

        def draw(chosen: np.ndarray, given: np.ndarray, grids=grids, context=context, count=count) -> None:
            """Draws the chosen codes, bool [rows, h, w], given others, of those rows that are wanted."""
            logits = program.logits(grids, given, context)
            for row in range(count):
                scaled = logits[row][chosen[row]] / (2.0**rounding.LOGIT_BITS * temperature)
                grids[row][chosen[row]] = np.argmax(scaled + rng.gumbel(size=scaled.shape), axis=1)

        free = ~there
        for step in range(steps):
            share = 1 - math.cos(math.pi / 2 * (step + 1) / steps)
            chosen = ~there & (places < first + np.ceil(share * unknown))
            draw(chosen, there)
            there |= chosen
        for sweep in range(SWEEPS):
            share = MOST_REDRAWN + (LEAST_REDRAWN - MOST_REDRAWN) * sweep / SWEEPS
            again = free & (rng.random(there.shape) < share)
            draw(again, ~again)
        found[start : start + count] = grids[:count]
    return found


def sample(
    model: TrainedModel,
    count: int,
    *,
    steps: int = STEPS,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """New slices float32 [count, H, W] in [0, 1], of the run's image size.

    Raises:
      CheckpointError: the run has no prior.
      ConfigError: a number cannot work.
    """
    program, rng = _ready(model, count, steps, temperature, seed)
    grid = model.config.model.latent_size
    nothing = np.zeros((count, *grid), np.int32)
    before, present = _no_neighbours(program, count, grid)
    options = {"steps": steps, "temperature": temperature, "rng": rng, "progress": progress}
    return _images(model, draw_codes(program, nothing, nothing > 0, before, present, **options))


def sample_volume(
    model: TrainedModel, slices: int, *, steps: int = STEPS, temperature: float = 1.0, seed: int = 0
) -> np.ndarray:
    """A new volume float32 [slices, H, W] in [0, 1]: each slice is given those before. Errors as for ``sample``."""
    program, rng = _ready(model, slices, steps, temperature, seed)
    grid = model.config.model.latent_size
    nothing, made = np.zeros((1, *grid), np.int32), []
    for _ in range(slices):
        before, present = _no_neighbours(program, 1, grid)
        for offset, grids in enumerate(made[: -program.prior.neighbours - 1 : -1]):
            before[:, offset], present[:, offset] = grids, True
        options = {"steps": steps, "temperature": temperature, "rng": rng}
        made.append(draw_codes(program, nothing, nothing > 0, before, present, **options))
    return _images(model, np.concatenate(made))


def inpaint(
    model: TrainedModel,
    image: np.ndarray,
    keep: np.ndarray,
    count: int = 1,
    *,
    steps: int = STEPS,
    temperature: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """A slice with what is not kept made anew, in its own intensities: float32 [count, H, W].

    A code is kept if all pixels that it stands for are. Pixels that are kept stay as they are.

    Args:
      model: a trained model with a prior.
      image: [H, W] of any real type.
      keep: bool [H, W].
      count: how often to make it anew.
      steps, temperature, seed: as for ``sample``.

    Raises:
      DataError: the shapes differ, or nothing is to be made.
      CheckpointError, ConfigError: as for ``sample``.
    """
    program, rng = _ready(model, count, steps, temperature, seed)
    keep = np.asarray(keep, bool)
    if keep.shape != np.shape(image) or keep.ndim != 2:
        raise DataError(f"a mask of shape {keep.shape} for a slice of shape {np.shape(image)}; expected one shape")
    if keep.all():
        raise DataError("a mask that keeps everything; what is to be made anew must be 0 in it")
    encoded = model.encode(image)
    known = model.codes_within(keep)
    grid = encoded.indices.shape[1:]
    before, present = _no_neighbours(program, count, grid)
    indices = np.repeat(encoded.indices, count, axis=0)
    options = {"steps": steps, "temperature": temperature, "rng": rng}
    indices = draw_codes(program, indices, np.repeat(known[None], count, axis=0), before, present, **options)
    ranges = np.repeat(encoded.ranges, count, axis=0)
    made = model.decode(EncodedImages(indices, (count, *keep.shape), ranges))
    return np.where(keep, np.asarray(image, np.float32), made)


def _ready(
    model: TrainedModel, count: int, steps: int, temperature: float, seed: int
) -> tuple[PriorProgram, np.random.Generator]:
    require(count >= 1, "--count", count, "1 or more")
    require(steps >= 1, "--steps", steps, "1 or more")
    require(0 < temperature < math.inf, "--temperature", temperature, "finite and greater than 0")
    require(0 <= seed < 2**32, "--seed", seed, "from 0 to 2**32 - 1")
    if model.prior is None:
        raise CheckpointError("the run has no prior over its codes; train one by scripts/train_prior.py")
    return model.prior, np.random.default_rng(integer_for(seed, Purpose.SAMPLES))


def _no_neighbours(program: PriorProgram, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    neighbours = program.prior.neighbours
    return np.zeros((count, neighbours, *grid), np.int32), np.zeros((count, neighbours), bool)


def _images(model: TrainedModel, indices: np.ndarray) -> np.ndarray:
    """Images in [0, 1] of the run's size."""
    shape = (len(indices), *model.config.model.image_size)
    return model.decode(EncodedImages(indices, shape, np.tile(np.float32([0, 1]), (len(indices), 1))))


def named(count: int) -> Iterator[str]:
    """Names of files for so many samples."""
    digits = len(str(count - 1))
    yield from (f"sample_{number:0{digits}d}.nii.gz" for number in range(count))
