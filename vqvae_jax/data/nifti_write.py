"""Write voxels back into the NIfTI file they came from: its header as it is, its number type, its byte order."""

import gzip
import math
import os
from pathlib import Path

import nibabel
import numpy as np

from vqvae_jax.data import nifti
from vqvae_jax.errors import DataError
from vqvae_jax.runtime.files import write_whole

SUFFIXES = (".nii", ".nii.gz")
_GZIP_LEVEL = 6  # gzip's own default: above it, much more time for hardly fewer bytes


def check_writable(header: bytes) -> None:
    """Raises DataError, with the reason alone, where intensities of one number cannot take the voxels' place."""
    dtype = parsed_header(header).get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        kind = "RGB" if dtype.fields else "complex"
        raise DataError(f"has {kind} voxels; convert it to one real number for each voxel")


def check_target(path: Path, *, overwrite: bool = False, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raises DataError where ``path`` is no name for such a file, is taken and ``overwrite`` is not set, or lies in no
    folder that can be written to: what is known before the work is done."""
    if not path.name.endswith(suffixes) or path.name in suffixes:
        raise DataError(f"{path}: cannot tell the format; give a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists; choose another name, or allow it to be replaced with --overwrite")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise DataError(f"{path}: cannot be written: {nearest} is a file, not a folder; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DataError(f"{path}: cannot be written: no permission for the folder {nearest}; choose another")


def write(path: Path, voxels: np.ndarray, header: bytes, *, overwrite: bool = False) -> None:
    """Writes a ``.nii`` or ``.nii.gz`` file, by its name, whole or not at all.

    Args:
      path: where to; its folder is made.
      voxels: intensities, of the shape in the header but for axes of length 1.
      header: ``nifti.Volume.header`` of the file they came from, kept byte for byte.
      overwrite: replace a file that is there.

    Raises:
      DataError: the file exists, cannot be written, or its voxels do not fit the header.
    """
    check_target(path, overwrite=overwrite)
    try:
        content = to_bytes(voxels, header)
    except DataError as error:
        raise DataError(f"{path}: cannot be written: the file it was made from {error}") from error
    if path.name.endswith(".gz"):
        content = gzip.compress(content, _GZIP_LEVEL, mtime=0)  # the same bytes at any time
    try:
        write_whole(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def to_bytes(voxels: np.ndarray, header: bytes) -> bytes:
    """The content of a ``.nii`` file: stored = (intensity - scl_inter) / scl_slope in the header's number type.

    Integers are rounded and all numbers clipped to what the type can hold.

    Raises:
      DataError: the header is damaged, or is one of other voxels.
    """
    check_writable(header)
    parsed = parsed_header(header)
    if math.prod(parsed.get_data_shape()) != voxels.size:
        raise DataError(f"has a header of {parsed.get_data_shape()} voxels, but {voxels.shape} are to be written")
    dtype = parsed.get_data_dtype()
    slope, inter = _slope_and_inter(parsed)
    with np.errstate(over="ignore"):  # clipped below
        stored = (voxels.astype(np.float64) - inter) / slope
    if dtype.kind in "iu":
        stored = np.rint(stored)
    stored = np.clip(stored, *_limits(dtype)).astype(dtype)
    return header + stored.tobytes(order="F")  # NIfTI: the first axis varies fastest


def float32_header(header: bytes) -> bytes:
    """``header`` for float32 voxels that are stored as they are, such as differences."""
    parsed = parsed_header(header)
    parsed.set_data_dtype(np.float32)
    parsed["scl_slope"], parsed["scl_inter"] = 1, 0
    parsed["cal_min"], parsed["cal_max"] = 0, 0  # the display range of the intensities
    return parsed.binaryblock + header[len(parsed.binaryblock) :]


def stored_shape(header: bytes) -> tuple[int, ...]:
    """The voxels' shape as the header has it, trailing axes of length 1 too."""
    return tuple(int(side) for side in parsed_header(header).get_data_shape())


def parsed_header(header: bytes) -> nibabel.Nifti1Header:
    """nibabel's header. Raises DataError where it is damaged or does not end where the voxels begin."""
    parsed = nifti.header_of(header)
    start = parsed.get_data_offset()
    if start != len(header):
        raise DataError(f"has a damaged header ({len(header)} bytes, but the voxels are to begin at {start})")
    return parsed


def _slope_and_inter(parsed: nibabel.Nifti1Header) -> tuple[float, float]:
    try:
        slope, inter = parsed.get_slope_inter()
    except Exception as error:  # nibabel's own kind, for an intercept that is not finite
        raise DataError(f"has a damaged header ({error})") from error
    return (1.0, 0.0) if slope is None else (float(slope), float(inter))


def _limits(dtype: np.dtype) -> tuple[float, float]:
    """The least and greatest float64 that the type can hold."""
    if dtype.kind not in "iu":
        greatest = float(np.finfo(dtype).max) if dtype.itemsize < 8 else np.finfo(np.float64).max
        return -greatest, greatest
    info = np.iinfo(dtype)
    greatest = float(info.max)
    return float(info.min), greatest if int(greatest) <= info.max else float(np.nextafter(greatest, 0))
