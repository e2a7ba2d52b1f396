"""Choose the axis along which a volume is cut into slices, and say why."""

import numpy as np

from vqvae_jax.data import nifti, nifti_write
from vqvae_jax.errors import DataError

NEARLY_ISOTROPIC = 1.05
"""Voxel spacings closer than this factor do not tell which axis was acquired slice by slice."""


def choose(volume: nifti.Volume, asked: int | None, fallback: int) -> tuple[int | None, str]:
    """The axis along which a file is cut into slices (None for a file that is one slice), and why, for people.

    In this order: an axis of length 1; the axis asked for; the header's ``dim_info``; the axis whose voxel spacing
    stands out, since slices are sampled alike along their two axes; ``fallback``.

    Raises:
      DataError: the file has no axis as asked for. The message gives the reason alone.
    """
    shape = volume.voxels.shape
    if len(shape) == 2:
        return None, "one slice"
    if 1 in shape:
        return shape.index(1), "its length is 1"
    if asked is not None:
        if asked not in range(-3, 3):
            raise DataError(f"has no axis {asked} (--slice-axis); choose 0, 1 or 2")
        return asked % 3, "as asked"
    named = _named(volume.header)
    if named is not None:
        return named, "by the header's dim_info"
    with np.errstate(over="ignore"):  # a damaged affine
        spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    least, middle, greatest = np.argsort(spacing, kind="stable")
    if spacing[least] > 0 and np.isfinite(spacing).all() and spacing[greatest] >= NEARLY_ISOTROPIC * spacing[least]:
        below, above = spacing[middle] / spacing[least], spacing[greatest] / spacing[middle]
        axis = greatest if above >= below else least
        others = " and ".join(f"{spacing[other]:.3g}" for other in range(3) if other != axis)
        return int(axis), f"its voxels are {spacing[axis]:.3g} mm apart, the others {others} mm"
    return fallback % 3, "as in training: the voxels are as far apart along all axes"


def _named(header: bytes) -> int | None:
    """The axis of slices in the header's ``dim_info``; None where it names none."""
    return nifti_write.parsed_header(header).get_dim_info()[2] if header else None
