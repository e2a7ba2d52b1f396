"""The .vqz file: a volume's codes and all that is needed to make a NIfTI file of them (docs/vqz.md)."""

import base64
import binascii
import dataclasses
import json
import math
import string
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqvae_jax import entropy, files
from vqvae_jax.data import nifti_write
from vqvae_jax.data.nifti import MAX_DEFLATE_RATIO, MAX_INTENSITY
from vqvae_jax.errors import DataError
from vqvae_jax.inference import Codes, NiftiCodes

MAGIC = b"\x93VQZ\r\n\x1a\n"
"""As PNG's: the first byte and the line ends show a file that was transferred as text."""
VERSION = 1
MAX_VOXELS_PER_BYTE = MAX_DEFLATE_RATIO
"""A file is padded to this, so that its size bounds what its reader allocates, as a NIfTI file's does."""
MAX_WORK_PER_BYTE = 1 << 18
WORK_PER_GRID, WORK_PER_CODE = 1 << 20, 1 << 12
"""A file is padded to one byte for this much work, WORK_PER_GRID a slice and level and WORK_PER_CODE + K a code: so its
size bounds the time, too."""
MAX_LEVELS = 2

_PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of deflated header
_CHECKSUM = struct.Struct("<I")
_MAX_HEADER = 1 << 18
_ADVICE = "copy it again, or encode the image again"


@dataclasses.dataclass(frozen=True, eq=False)
class CodeFile:
    """What a .vqz file holds.

    Attributes:
      codes: of the NIfTI file.
      num_codes: K of each level.
      fingerprint: of the model, hexadecimal.
    """

    codes: NiftiCodes
    num_codes: tuple[int, ...]
    fingerprint: str


def to_bytes(file: CodeFile) -> bytes:
    """The .vqz file. Raises DataError if its header is too long (some ten thousand slices, each with its own range)."""
    codes, payloads, levels = file.codes.codes, [], []
    for level, num_codes in zip(codes.levels, file.num_codes, strict=True):
        payload, classes = entropy.encode(level, num_codes)
        payloads.append(payload)
        text = entropy.classes_to_text(classes)
        levels.append({"shape": level.shape, "codes": num_codes, "bytes": len(payload), "classes": text})
    ranges = np.asarray(codes.ranges, "<f4")
    if (ranges == ranges[0]).all():
        ranges = ranges[:1]
    nifti = zlib.compress(file.codes.header, 9)
    header = {
        "shape": codes.shape,
        "slice_axis": file.codes.slice_axis,
        "ranges": base64.b64encode(ranges.tobytes()).decode(),
        "levels": levels,
        "model": file.fingerprint,
        "nifti": len(nifti),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > _MAX_HEADER:
        raise DataError(f"needs a header of {len(text)} bytes, more than the {_MAX_HEADER} that a .vqz file may have")
    deflated = zlib.compress(text, 9)
    content = b"".join([_PREFIX.pack(MAGIC, VERSION, len(deflated)), deflated, nifti, *payloads])
    least = _least_size(codes.shape, [(level.shape, k) for level, k in zip(codes.levels, file.num_codes, strict=True)])
    content += bytes(max(0, least - len(content) - _CHECKSUM.size))
    return content + _CHECKSUM.pack(zlib.crc32(content))


def from_bytes(content: bytes) -> CodeFile:
    """Inverse of ``to_bytes``. Allocates no more than the content's length justifies.

    Raises:
      DataError: this is not a whole, unaltered .vqz file of a version known here. The message gives the reason alone.
    """
    if not content.startswith(MAGIC):
        raise DataError("is not a .vqz file; expected what scripts/encode.py writes")
    if len(content) < _PREFIX.size + _CHECKSUM.size:
        raise DataError(f"is truncated: {len(content)} bytes; {_ADVICE}")
    _, version, length = _PREFIX.unpack_from(content)
    if version != VERSION:
        raise DataError(f"is of version {version}; expected {VERSION}: use the vqvae_jax that wrote it, or a newer one")
    body = memoryview(content)[: -_CHECKSUM.size]
    if zlib.crc32(body) != _CHECKSUM.unpack(content[-_CHECKSUM.size :])[0]:
        raise DataError(f"is truncated or altered (its checksum does not match); {_ADVICE}")
    try:
        header = _read_header(_inflate(body[_PREFIX.size :][:length], _MAX_HEADER))
        return _parse(header, body[_PREFIX.size + length :], len(content))
    except DataError as error:
        raise DataError(f"{error}; {_ADVICE}") from error


def save(path: Path, file: CodeFile) -> int:
    """Writes a .vqz file whole or not at all, and returns its size in bytes. Raises DataError if it cannot."""
    try:
        content = to_bytes(file)
        files.write_whole(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return len(content)


def load(path: Path) -> CodeFile:
    """Reads a .vqz file. Raises DataError, with the file's name, as ``from_bytes`` does."""
    try:
        if path.is_fifo():  # which would be waited for
            raise DataError("is a pipe; expected a file")
        return from_bytes(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _least_size(shape: tuple[int, ...], levels: list[tuple[tuple[int, ...], int]]) -> int:
    """Bytes that a file with so many voxels, and levels of such shapes and K, has at least."""
    work = sum(level[0] * WORK_PER_GRID + math.prod(level) * (WORK_PER_CODE + num_codes) for level, num_codes in levels)
    return max(-(-work // MAX_WORK_PER_BYTE), -(-math.prod(shape) // MAX_VOXELS_PER_BYTE))


def _inflate(deflated: memoryview, most: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(deflated, most + 1)
    except zlib.error as error:
        raise DataError(f"has a damaged header ({error})") from error
    if len(content) > most or not inflater.eof or inflater.unused_data:
        raise DataError("has a damaged header (its length is wrong)")
    return content


def _read_header(content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError("has a damaged header (it is not JSON)") from error
    return _typed(header, dict, "object")


def _parse(header: dict[str, Any], body: memoryview, size: int) -> CodeFile:
    shape = _shape(header.get("shape"))
    entries = [_typed(entry, dict, "object") for entry in _typed(header.get("levels"), list, "list of levels")]
    shapes = [_shape(entry.get("shape")) for entry in entries]
    sizes = [_natural(entry.get("codes"), entropy.MAX_CODES, 2) for entry in entries]
    if not 1 <= len(entries) <= MAX_LEVELS or any(level[0] != shape[0] for level in shapes):
        raise DataError(f"has a damaged header (levels of shapes {shapes[:MAX_LEVELS]} for slices {shape})")
    if size < _least_size(shape, list(zip(shapes, sizes, strict=True))):
        raise DataError(f"has a damaged header (it announces more than {size} bytes can hold)")
    ranges = _ranges(header.get("ranges"), shape[0])
    slice_axis = header.get("slice_axis")
    slice_axis = None if slice_axis is None else _natural(slice_axis, 2)
    fingerprint = _typed(header.get("model"), str, "text")
    if not fingerprint or not set(fingerprint) <= set(string.hexdigits):
        raise DataError("has a damaged header (its model is not hexadecimal)")
    length = _natural(header.get("nifti"), len(body))
    nifti, body = _inflate(body[:length], length * MAX_DEFLATE_RATIO), body[length:]
    _check_voxels(nifti, shape, slice_axis)
    levels = []
    for entry, level, num_codes in zip(entries, shapes, sizes, strict=True):
        classes = entropy.classes_from_text(_typed(entry.get("classes"), str, "text"), num_codes)
        length = _natural(entry.get("bytes"), len(body))
        levels.append(entropy.decode(bytes(body[:length]), level, classes))
        body = body[length:]
    if any(body):
        raise DataError("holds bytes beyond its codes")
    return CodeFile(NiftiCodes(Codes(tuple(levels), shape, ranges), nifti, slice_axis), tuple(sizes), fingerprint)


def _check_voxels(nifti: bytes, shape: tuple[int, int, int], slice_axis: int | None) -> None:
    """Raises DataError where these slices are not the voxels of this NIfTI header."""
    count, *expected = shape
    expected.insert(2 if slice_axis is None else slice_axis, count)
    found = nifti_write.stored_shape(nifti)
    if _without_trailing_ones(found) != _without_trailing_ones(expected):
        raise DataError(f"has a damaged header (slices {shape} along axis {slice_axis} of a volume {found})")


def _without_trailing_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[: max((axis + 1 for axis, side in enumerate(shape) if side != 1), default=0)])


def _ranges(text: Any, slices: int) -> np.ndarray:
    try:
        content = base64.b64decode(_typed(text, str, "text"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("has a damaged header (its ranges are not base64)") from error
    if len(content) not in (8, 8 * slices):
        raise DataError(f"has a damaged header ({len(content)} bytes of ranges for {slices} slices)")
    ranges = np.frombuffer(content, "<f4").astype(np.float32).reshape(-1, 2)
    if not (np.abs(ranges) <= MAX_INTENSITY).all() or (ranges[:, 0] > ranges[:, 1]).any():
        raise DataError("has a damaged header (its ranges are not intensities)")
    return np.broadcast_to(ranges, (slices, 2))


def _typed(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise DataError(f"has a damaged header (expected {name}, found {str(value)[:40]!r})")
    return value


def _natural(value: Any, largest: int, least: int = 0) -> int:
    if not least <= _typed(value, int, "whole number") <= largest:
        raise DataError(f"has a damaged header ({str(value)[:40]} is not in {least} to {largest})")
    return value


def _shape(value: Any) -> tuple[int, int, int]:
    sides = [_natural(side, 2**31) for side in _typed(value, list, "shape")]
    if len(sides) != 3 or 0 in sides:
        raise DataError(f"has a damaged header (expected a shape of three sides, found {str(value)[:40]})")
    return tuple(sides)
