"""The .vqz file: a volume's codes and all that is needed to make a NIfTI file of them (docs/vqz.md)."""

import base64
import binascii
import dataclasses
import json
import math
import os
import string
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from vqvae_jax import entropy
from vqvae_jax.errors import DataError

MAGIC = b"\x93VQZ\r\n\x1a\n"
"""As PNG's: the first byte and the line ends show a file that was transferred as text."""
VERSION = 1
MAX_VOXELS_PER_BYTE = 1032
"""A file is padded to this, so that its size bounds what its reader allocates; deflate reaches as much."""
MAX_WORK_PER_BYTE = 1 << 18
WORK_PER_CODE = 1 << 12
"""A file is padded to one byte for this much work, WORK_PER_CODE + K a code: so its size bounds the time, too."""
MAX_LEVELS = 2

_PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of deflated header
_CHECKSUM = struct.Struct("<I")
_MAX_HEADER = 1 << 18
_ADVICE = "copy it again, or encode the image again"


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """What a .vqz file holds.

    Attributes:
      levels: codes int32 [N, h, w] of each level, the finest first; slice n of the volume is codes [n].
      num_codes: K of each level.
      shape: [N, H, W] of the slices in voxels.
      ranges: float32 [N, 2], the intensities that are 0 and 1.
      slice_axis: the volume's axis that the slices were cut along.
      nifti: the NIfTI header to write, 348 or 540 bytes.
      fingerprint: of the model, hexadecimal.
    """

    levels: tuple[np.ndarray, ...]
    num_codes: tuple[int, ...]
    shape: tuple[int, int, int]
    ranges: np.ndarray
    slice_axis: int
    nifti: bytes
    fingerprint: str


def to_bytes(file: CodeFile) -> bytes:
    """The .vqz file, always the same for the same content. Raises DataError if it cannot be written so."""
    parts, levels = [], []
    for codes, num_codes in zip(file.levels, file.num_codes, strict=True):
        payload, classes = entropy.encode(codes, num_codes)
        parts.append(payload)
        text = entropy.classes_to_text(classes)
        levels.append({"shape": codes.shape, "codes": num_codes, "bytes": len(payload), "classes": text})
    ranges = np.asarray(file.ranges, "<f4")
    if (ranges == ranges[0]).all():
        ranges = ranges[:1]
    header = {
        "shape": file.shape,
        "slice_axis": file.slice_axis,
        "ranges": _to_text(ranges.tobytes()),
        "levels": levels,
        "model": file.fingerprint,
        "nifti": _to_text(file.nifti),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > _MAX_HEADER:
        raise DataError(f"has a header of {len(text)} bytes, more than the {_MAX_HEADER} a .vqz file may have")
    deflated = zlib.compress(text, 9)
    content = b"".join([_PREFIX.pack(MAGIC, VERSION, len(deflated)), deflated, *parts])
    least = _least_size(file.shape, [(level.shape, k) for level, k in zip(file.levels, file.num_codes, strict=True)])
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
        header = _inflate(body[_PREFIX.size :][:length])
        return _parse(header, body[_PREFIX.size + length :], len(content))
    except DataError as error:
        raise DataError(f"{error}; {_ADVICE}") from error


def save(path: Path, file: CodeFile) -> int:
    """Writes a .vqz file whole or not at all, and returns its size in bytes."""
    content = to_bytes(file)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(content)


def load(path: Path) -> CodeFile:
    """Reads a .vqz file. Raises DataError, with the file's name, as ``from_bytes`` does."""
    try:
        return from_bytes(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _least_size(shape: tuple[int, ...], levels: list[tuple[tuple[int, ...], int]]) -> int:
    """Bytes that a file with so many voxels, and levels of such shapes and K, has at least."""
    work = sum(math.prod(level) * (WORK_PER_CODE + num_codes) for level, num_codes in levels)
    return max(-(-work // MAX_WORK_PER_BYTE), -(-math.prod(shape) // MAX_VOXELS_PER_BYTE))


def _inflate(deflated: memoryview) -> dict[str, Any]:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(deflated, _MAX_HEADER + 1)
        if len(text) > _MAX_HEADER or not inflater.eof or inflater.unused_data:
            raise DataError("has a damaged header (its length is wrong)")
        header = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise DataError("has a damaged header (it is not deflated JSON)") from error
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
    slice_axis = _natural(header.get("slice_axis"), 2)
    ranges = np.frombuffer(_from_text(header.get("ranges")), np.uint8)
    if ranges.size not in (8, 8 * shape[0]):
        raise DataError(f"has a damaged header ({ranges.size} bytes of ranges for {shape[0]} slices)")
    ranges = ranges.view("<f4").astype(np.float32).reshape(-1, 2)
    if not np.isfinite(ranges).all() or (ranges[:, 0] > ranges[:, 1]).any():
        raise DataError("has a damaged header (its ranges are not intensities)")
    nifti, fingerprint = _from_text(header.get("nifti")), _typed(header.get("model"), str, "text")
    if not nifti or not fingerprint or not set(fingerprint) <= set(string.hexdigits):
        raise DataError("has a damaged header (its nifti or model is missing)")
    levels = []
    for entry, level, num_codes in zip(entries, shapes, sizes, strict=True):
        classes = entropy.classes_from_text(_typed(entry.get("classes"), str, "text"), num_codes)
        length = _natural(entry.get("bytes"), len(body))
        levels.append(entropy.decode(bytes(body[:length]), level, classes))
        body = body[length:]
    if any(body):
        raise DataError("holds bytes beyond its codes")
    return CodeFile(
        levels=tuple(levels),
        num_codes=tuple(sizes),
        shape=shape,
        ranges=np.broadcast_to(ranges, (shape[0], 2)),
        slice_axis=slice_axis,
        nifti=nifti,
        fingerprint=fingerprint,
    )


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


def _to_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _from_text(text: Any) -> bytes:
    try:
        return base64.b64decode(_typed(text, str, "text"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError("has a damaged header (it is not base64)") from error
