"""Which slices of a split follow one another in a volume."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vqvae_jax.data.splits import week_and_slice


def volumes(files: Sequence[str], cases: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    """The volume that each slice of a split belongs to, numbered from 0 in the order they appear: int32 [N].

    In HipMRI's layout, where each file is a slice, a volume is a case and a week; else it is a file.

    Args:
      files, cases, numbers: of each slice: its file, its case, its number in the volume.
    """
    found: dict[tuple, int] = {}
    keys = [_volume(*each) for each in zip(files, cases, strict=True)]
    if len(keys) != len(numbers):
        raise ValueError(f"{len(keys)} files and {len(numbers)} slice numbers")
    return np.array([found.setdefault(key, len(found)) for key in keys], np.int32)


def neighbours(volume: np.ndarray, numbers: Sequence[int], offset: int) -> np.ndarray:
    """For each slice, the place in the split of the one whose number is higher by ``offset``; -1 where there is none.

    int32 [N]. Of two slices with one number in one volume, the later counts.
    """
    places = {(int(own), int(number)): place for place, (own, number) in enumerate(zip(volume, numbers, strict=True))}
    wanted = ((int(own), int(number) + offset) for own, number in zip(volume, numbers, strict=True))
    return np.array([places.get(key, -1) for key in wanted], np.int32)


def of_slices(slices: Any) -> tuple[np.ndarray, list[int]]:
    """``volumes`` of a split (`loader.Slices`), and each slice's number in its volume."""
    samples = [slices.sample(place) for place in range(len(slices))]
    numbers = [sample.slice for sample in samples]
    return volumes([sample.file for sample in samples], [sample.case for sample in samples], numbers), numbers


def around(volume: np.ndarray, numbers: Sequence[int], offsets: Sequence[int]) -> np.ndarray:
    """`neighbours` at several offsets: int32 [N, offsets]."""
    return np.stack([neighbours(volume, numbers, offset) for offset in offsets], axis=1)


def _volume(file: str, case: str) -> tuple:
    week, number = week_and_slice(file)
    return (file,) if number < 0 else (file.rpartition("/")[0], case, week)
