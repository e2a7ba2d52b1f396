"""Read NIfTI files safely, and cut volumes into slices."""

import dataclasses
import gzip
import io
import logging
import math
import zlib
from pathlib import Path
from typing import BinaryIO, Literal

import nibabel
import numpy as np

from vqvae_jax.errors import DataError

MAX_DEFLATE_RATIO = 1032
"""Deflate cannot expand data by more than this (zlib's technical details)."""
MIN_SIDE = 7
"""Sides below SSIM's 7 x 7 window cannot be evaluated."""
QUATERNION_ROUNDING = 1e-3
"""So much longer than 1 a qform's quaternion may be; nibabel refuses 1e-6, and a longer one is damage."""
MAX_INTENSITY = 1e38
"""Differences of larger voxels overflow float32."""
DIRECTIONS = dict.fromkeys("LR", "left-right") | dict.fromkeys("AP", "front-back") | dict.fromkeys("SI", "head-foot")
"""Anatomical directions by nibabel's codes of their ends."""
_HEADER_BYTES = (348, 540)  # NIfTI-1 and -2
_MAX_AXES = 7
_HEAD_BYTES = 1 << 12
_TRAILING_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22
_SLAB_VOXELS = 1 << 16
_SILENT = logging.getLogger("vqvae_jax.nibabel")
_SILENT.setLevel(logging.CRITICAL + 1)  # nibabel tells stderr of each value it repairs
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601


@dataclasses.dataclass(frozen=True)
class Volume:
    """Voxels of one file: float32 [X, Y] or [X, Y, Z], intensities as acquired, and where they lie (mm).

    ``header`` is all that precedes the voxels in the file, as it is there: header and extensions.
    """

    voxels: np.ndarray
    affine: np.ndarray
    header: bytes = b""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file's header alone says.

    Attributes:
      shape: [X, Y] or [X, Y, Z].
      affine: float64 [4, 4], voxels to mm.
      placed: whether the file says how it lies in the body (a qform or an sform); else the affine is a guess.
      whole_numbers: whether voxels are stored as integers, without scaling, as label maps are.
      acquired: the axis of slices in ``dim_info``, or None.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    placed: bool
    whole_numbers: bool
    acquired: int | None

    @property
    def spacing(self) -> tuple[float, ...]:
        """Millimetres between voxels, along each axis."""
        with np.errstate(over="ignore"):  # a damaged affine
            return tuple(np.linalg.norm(self.affine[:3, :3], axis=0)[: len(self.shape)].tolist())

    @property
    def directions(self) -> tuple[str, ...] | None:
        """What each of the three axes is closest to: "left-right", "front-back" or "head-foot"; None if not known."""
        if not self.placed or not np.isfinite(self.affine).all():
            return None
        codes = nibabel.orientations.aff2axcodes(self.affine)
        return None if None in codes else tuple(DIRECTIONS[code] for code in codes)


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice: float32 [H, W] and a [4, 4] affine from (row, column, 0) to scanner space (mm)."""

    pixels: np.ndarray
    affine: np.ndarray


def read(source: Path | BinaryIO, size: int | None = None, *, nan: Literal["refuse", "zero"] = "refuse") -> Volume:
    """Reads a ``.nii`` or ``.nii.gz`` file (NIfTI-1 or -2, either byte order, any voxel type up to 64-bit parts).

    ``scl_slope`` and ``scl_inter`` are applied; complex voxels become magnitudes and RGB voxels their
    luma. Trailing axes of length 1 are dropped. Takes at most twice the bytes of the file (unzipped) and 4 bytes a
    voxel, whatever its header says.

    Args:
      source: a path, or a binary stream (then ``size`` is needed).
      size: bytes in the stream.
      nan: refuse a file with voxels that are NaN, or read them as 0.

    Raises:
      DataError: the file is not NIfTI, is truncated or damaged, is not 2-D or 3-D, or holds voxels that
        are not finite in float32. The message gives the reason alone: the caller knows the file's name.
    """
    return _parse(read_bytes(source, size), nan)


def read_bytes(source: Path | BinaryIO, size: int | None = None) -> bytes:
    """The content of a file as it is before compression, from its header to its last voxel. As ``read`` otherwise."""
    if isinstance(source, Path):
        try:
            if source.is_fifo():  # opening it would wait for a writer
                raise DataError("is a pipe; expected a file")
            with source.open("rb") as stream:
                return read_bytes(stream, source.stat().st_size)
        except OSError as error:
            raise DataError(f"cannot be opened ({error.strerror or error})") from error
    if not size:
        raise DataError("is empty (0 bytes)")
    return _read_bounded(source, size)


def _read_bounded(stream: BinaryIO, size: int) -> bytes:
    """All bytes the header asks for, after checking that a file of ``size`` bytes can hold them."""
    buffered = io.BufferedReader(stream) if not hasattr(stream, "peek") else stream
    try:
        compressed = buffered.peek(2)[:2] == b"\x1f\x8b"
        reader = gzip.GzipFile(fileobj=buffered) if compressed else buffered
        head = reader.read(_HEADER_BYTES[-1])
        expected = _bytes_needed(header_of(head))
        if expected > size * (MAX_DEFLATE_RATIO if compressed else 1):
            raise DataError(
                f"is truncated: its header announces {expected} bytes, more than {size} bytes on disk can hold"
            )
        parts, count = [head], len(head)
        while count < expected:
            part = reader.read(min(_CHUNK_BYTES, expected - count))
            if not part:
                raise DataError(f"is truncated: {count} of {expected} bytes are there")
            parts.append(part)
            count += len(part)
        # Reading on to the end makes gzip check its checksum.
        if compressed and len(reader.read(_TRAILING_BYTES + 1)) > _TRAILING_BYTES:
            raise DataError(f"holds more than the {expected} bytes its header announces")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"is truncated or damaged ({error})") from error
    return b"".join(parts)


def read_header(stream: BinaryIO) -> Header:
    """What the header of a ``.nii`` or ``.nii.gz`` file says; its voxels are not read.

    Raises:
      DataError: as for ``read``, as far as the header shows it.
    """
    head = stream.read(_HEAD_BYTES)
    if not head:
        raise DataError("is empty (0 bytes)")
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _HEADER_BYTES[-1])
        except zlib.error as error:
            raise DataError(f"is truncated or damaged ({error})") from error
    return parse_header(header_of(head))


def parse_header(header: nibabel.Nifti1Header) -> Header:
    """What is in a header that ``header_of`` returned. Raises DataError where it is damaged."""
    slope, inter = _scaling(header)
    dtype = header.get_data_dtype()
    return Header(
        _shape(header),
        _affine(header),
        bool(header["qform_code"] > 0 or header["sform_code"] > 0),
        dtype.kind in "iu" and not dtype.fields and (slope is None or (slope, inter) == (1, 0)),
        header.get_dim_info()[2],
    )


def header_of(head: bytes) -> nibabel.Nifti1Header:
    """The header (NIfTI-1 or -2), repaired where nibabel can, of a file that begins with ``head``.

    Extensions are left alone: nibabel warns of or fails on damaged ones, and no voxel depends on them.

    Raises:
      DataError: this is no header of a single-file NIfTI, or a damaged one; the reason alone.
    """
    for cls, length in zip((nibabel.Nifti1Header, nibabel.Nifti2Header), _HEADER_BYTES, strict=True):
        for order in ("little", "big"):
            if head[:4] == length.to_bytes(4, order) and len(head) >= length:
                header = cls(head[:length], order, check=False)
                try:
                    header.check_fix(_SILENT)
                except Exception as error:  # nibabel raises many kinds on damaged headers
                    raise DataError(f"has a damaged header ({error})") from error
                if header["magic"].item() != header.single_magic:
                    raise DataError("is the header of a .hdr and .img pair; convert the pair to one .nii file")
                return header
    raise DataError("is not a NIfTI file")


def _shape(header: nibabel.Nifti1Header) -> tuple[int, ...]:
    """[X, Y] or [X, Y, Z]."""
    axes = int(header["dim"][0])
    if not 1 <= axes <= _MAX_AXES:
        raise DataError(f"has a damaged header (dim[0] is {axes})")
    shape = announced = tuple(int(side) for side in header["dim"][1 : axes + 1])
    if min(shape) < 1:
        raise DataError(f"has no voxels: its shape is {shape}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3):
        raise DataError(f"is {len(shape)}-D, of shape {announced}; expected a 2-D slice or a 3-D volume")
    return shape


def _bytes_needed(header: nibabel.Nifti1Header) -> int:
    """File length that follows from the header."""
    offset = float(header["vox_offset"])
    if not header.single_vox_offset <= offset < 2**62:  # nibabel takes 0 literally
        raise DataError(f"has a damaged header (vox_offset is {offset:g})")
    return header.get_data_offset() + math.prod(_shape(header)) * header.get_data_dtype().itemsize


def _scaling(header: nibabel.Nifti1Header) -> tuple[float | None, float | None]:
    with np.errstate(all="ignore"):
        try:
            return header.get_slope_inter()
        except Exception as error:  # nibabel's own kind, for an intercept that is not finite
            raise DataError(f"has a damaged header ({error})") from error


def _affine(header: nibabel.Nifti1Header) -> np.ndarray:
    """float64 [4, 4]. A quaternion that rounding made longer than 1 is shortened, as by the C library."""
    quaternion = [float(header[f"quatern_{name}"]) for name in "bcd"]
    length = math.hypot(*quaternion)
    if 1 < length <= 1 + QUATERNION_ROUNDING:
        header = header.copy()
        for name, value in zip("bcd", quaternion, strict=True):
            header[f"quatern_{name}"] = value / length * (1 - float(np.finfo(np.float32).eps))
    with np.errstate(all="ignore"):
        try:
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        except Exception as error:  # nibabel raises many kinds on damaged headers
            raise DataError(f"has a damaged header ({error})") from error
    if not np.isfinite(affine).all():
        raise DataError("has a damaged header (its affine is not finite)")
    return affine


def _parse(content: bytes, nan: Literal["refuse", "zero"]) -> Volume:
    header = header_of(content)
    shape, affine = _shape(header), _affine(header)
    slope, inter = _scaling(header)
    with np.errstate(all="ignore"):
        stored = np.frombuffer(content, header.get_data_dtype(), math.prod(shape), header.get_data_offset())
        voxels, bad, nans = np.empty(stored.size, np.float32), 0, 0
        for start in range(0, stored.size, _SLAB_VOXELS):  # float64 copies of all voxels would be many times the file
            slab = voxels[start : start + _SLAB_VOXELS]
            slab[:] = _scaled(stored[start : start + _SLAB_VOXELS], slope, inter)
            nans += np.count_nonzero(np.isnan(slab))
            if nan == "zero":
                slab[np.isnan(slab)] = 0
            bad += slab.size - np.count_nonzero(np.abs(slab) <= MAX_INTENSITY)
    if bad:
        advice = "; --nan zero reads NaN as 0" if nan == "refuse" and bad == nans else ""
        raise DataError(
            f"holds {bad} voxels that are NaN, infinite or beyond {MAX_INTENSITY:g}, of {voxels.size}{advice}"
        )
    return Volume(voxels.reshape(shape, order="F"), affine, content[: header.get_data_offset()])


def _scaled(stored: np.ndarray, slope: float | None, inter: float | None) -> np.ndarray:
    """Real intensities [N] of stored voxels [N]; no slope, no scaling."""
    if stored.dtype.fields:  # NIfTI: scl_slope does not hold for colours
        return np.stack([stored[name].astype(np.float32) for name in "RGB"], axis=-1) @ _LUMA
    if slope is not None and (slope, inter) != (1, 0):
        stored = stored * np.float64(slope) + np.float64(inter)
    return np.abs(stored) if stored.dtype.kind == "c" else stored


def slices(volume: Volume, slice_axis: int = -1) -> list[Slice]:
    """The slices of a file: itself if 2-D or with an axis of length 1, else all along ``slice_axis``.

    Raises:
      DataError: the axis does not exist, or a slice has a side below 7 pixels.
    """
    voxels, affine = volume.voxels, volume.affine
    if voxels.ndim == 2:
        cut = [Slice(voxels, affine)]
    else:
        axis = voxels.shape.index(1) if 1 in voxels.shape else range(3)[slice_axis]
        rest = [other for other in range(3) if other != axis]
        cut = []
        for index in range(voxels.shape[axis]):
            place = affine[:, [*rest, axis, 3]].copy()
            place[:, 3] += index * affine[:, axis]
            # Not np.take, which copies the whole volume for each slice, since files have their first axis fastest.
            pixels = np.ascontiguousarray(voxels[(slice(None),) * axis + (index,)])
            cut.append(Slice(pixels, place))
    check_slice_shape(cut[0].pixels.shape)
    return cut


def check_slice_shape(shape: tuple[int, ...]) -> None:
    """Raises DataError where slices of this shape are too small to evaluate."""
    if min(shape) < MIN_SIDE:
        raise DataError(f"has slices of {shape[0]} x {shape[1]} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed")
