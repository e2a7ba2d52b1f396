"""Choose the axis along which a volume is cut into slices, and say why."""

import dataclasses
import math

import numpy as np

from vqvae_jax.data.nifti import Header
from vqvae_jax.errors import DataError

NEARLY_ISOTROPIC = 1.05
"""Voxel spacings closer than this factor do not tell which axis was acquired slice by slice."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a file is cut into slices.

    Attributes:
      axis: of the voxels; None for a file that is one slice.
      reason: why that axis, for people.
      doubt: what may be wrong with it, for people; empty where nothing is.
    """

    axis: int | None
    reason: str
    doubt: str = ""


def choose(header: Header, asked: int | None = None, direction: str | None = None) -> Cut:
    """The axis along which a file is cut into slices.

    The first of these that is known: an axis of length 1; the axis asked for; the one closest to the anatomical
    ``direction``; the header's ``dim_info``; the axis whose voxel spacing stands out, since slices are sampled alike
    along their two axes; the last.

    Args:
      header: of the file.
      asked: an axis between -3 and 2.
      direction: one of nifti.DIRECTIONS, such as that of a model's training volumes.

    Raises:
      DataError: the file has no axis as asked for. The message gives the reason alone.
    """
    shape = header.shape
    if len(shape) == 2:
        return Cut(None, "one slice")
    if 1 in shape:
        return Cut(shape.index(1), "its length is 1")
    if asked is not None:
        if asked not in range(-3, 3):
            raise DataError(f"has no axis {asked} (--slice-axis); choose 0, 1 or 2")
        return Cut(asked % 3, "as asked")
    cut = _by_header(header)
    if direction is None:
        return cut
    if header.directions is None:
        return dataclasses.replace(cut, doubt=f"the header does not say which axis is {direction}")
    return Cut(header.directions.index(direction), direction)


def _by_header(header: Header) -> Cut:
    if header.acquired is not None:
        return Cut(header.acquired, "by the header's dim_info")
    spacing = header.spacing
    least, middle, greatest = np.argsort(spacing, kind="stable").tolist()
    known = spacing[least] > 0 and all(map(math.isfinite, spacing))
    if known and spacing[greatest] >= NEARLY_ISOTROPIC * spacing[least]:
        below, above = spacing[middle] / spacing[least], spacing[greatest] / spacing[middle]
        axis = greatest if above >= below else least
        others = " and ".join(f"{spacing[other]:.3g}" for other in range(3) if other != axis)
        return Cut(axis, f"its voxels are {spacing[axis]:.3g} mm apart, the others {others} mm")
    return Cut(2, "the last", "voxels are as far apart along all axes, so the last axis is a guess")
