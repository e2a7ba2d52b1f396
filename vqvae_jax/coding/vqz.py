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

from vqvae_jax.coding import entropy, prior_coder
from vqvae_jax.coding.encoded import EncodedImages, EncodedNifti
from vqvae_jax.data import nifti_write
from vqvae_jax.data.nifti import MAX_DEFLATE_RATIO, MAX_INTENSITY, parse_header
from vqvae_jax.errors import DataError
from vqvae_jax.models.prior_integers import PriorProgram
from vqvae_jax.runtime.files import write_whole

MAGIC = b"\x93VQZ\r\n\x1a\n"
"""As PNG's: the first byte and the line ends show a file that was transferred as text."""
SIMPLE, BY_PRIOR = 1, 2
"""Versions: codes by the simple coder, or by a run's prior."""
MAX_VOXELS_PER_BYTE = MAX_DEFLATE_RATIO
"""A file is padded to this, so that its size bounds what its reader allocates, as a NIfTI file's does."""
MAX_WORK_PER_BYTE = 1 << 18
WORK_PER_GRID, WORK_PER_CODE = 1 << 20, 1 << 12
"""A file is padded to one byte for this much work, WORK_PER_GRID a slice and WORK_PER_CODE + K a code: so its size
bounds the time, too."""

MAX_CODES_PER_BYTE = 32
"""The same for a file that is coded by a prior, where a code costs its reader much more."""
PRIOR_DIGITS = 16
"""Hexadecimal digits of the prior's fingerprint that a file has."""

_PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of deflated header
_CHECKSUM = struct.Struct("<I")
_MAX_HEADER = 1 << 18
_ADVICE = "copy it again, or encode the image again"


@dataclasses.dataclass(frozen=True, eq=False)
class VqzFile:
    """What a .vqz file holds.

    Attributes:
      encoded: the NIfTI file.
      num_embeddings: K.
      fingerprint: of the model, hexadecimal.
      lost: the numbers of slices whose codes were damaged, and are 0 here.
    """

    encoded: EncodedNifti
    num_embeddings: int
    fingerprint: str
    lost: tuple[int, ...] = ()


def to_bytes(file: VqzFile, prior: PriorProgram | None = None) -> bytes:
    """The .vqz file: by the prior where there is one and that takes fewer bytes, else by the simple coder.

    Raises:
      DataError: its header is too long (some ten thousand slices, each with its own range).
    """
    simple = simple_to_bytes(file)
    return simple if prior is None else min(simple, prior_to_bytes(file, prior), key=len)


def simple_to_bytes(file: VqzFile) -> bytes:
    images = file.encoded.images
    payload, classes = entropy.encode(images.indices, file.num_embeddings)
    content = _beginning(file, SIMPLE, {"classes": entropy.classes_to_text(classes), "bytes": len(payload)}) + payload
    least = _least_size(images.shape, images.indices.shape, file.num_embeddings)
    return _with_checksum(content + bytes(max(0, least - len(content) - _CHECKSUM.size)))


def prior_to_bytes(file: VqzFile, program: PriorProgram) -> bytes:
    images = file.encoded.images
    payloads = prior_coder.encode(images.indices, program)
    about = {"prior": program.prior.fingerprint[:PRIOR_DIGITS], "bytes": [len(payload) for payload in payloads]}
    content = b"".join([_with_checksum(_beginning(file, BY_PRIOR, about)), *map(_with_checksum, payloads)])
    return content + bytes(max(0, _least_size_by_prior(images.shape, images.indices.shape) - len(content)))


def _beginning(file: VqzFile, version: int, about_codes: dict[str, Any]) -> bytes:
    """All that comes before the codes."""
    images = file.encoded.images
    ranges = np.asarray(images.ranges, "<f4")
    if (ranges == ranges[0]).all():
        ranges = ranges[:1]
    nifti = zlib.compress(file.encoded.header, 9)
    header = {
        "shape": images.shape,
        "slice_axis": file.encoded.slice_axis,
        "ranges": base64.b64encode(ranges.tobytes()).decode(),
        "grid": images.indices.shape[1:],
        "num_embeddings": file.num_embeddings,
        **about_codes,
        "model": file.fingerprint,
        "nifti": len(nifti),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > _MAX_HEADER:
        raise DataError(f"needs a header of {len(text)} bytes, more than the {_MAX_HEADER} that a .vqz file may have")
    deflated = zlib.compress(text, 9)
    return b"".join([_PREFIX.pack(MAGIC, version, len(deflated)), deflated, nifti])


def from_bytes(content: bytes, prior: PriorProgram | None = None, *, salvage: bool = False) -> VqzFile:
    """Inverse of ``to_bytes``. Allocates no more than the content's length justifies.

    Args:
      content: the file.
      prior: the prior of the run that encoded it; a file by the simple coder needs none.
      salvage: take a damaged file by a prior, if its header is whole; ``lost`` says what it lacks.

    Raises:
      DataError: this is not a whole, unaltered .vqz file of a version known here, or was coded by another prior. The
        message gives the reason alone.
    """
    if not content.startswith(MAGIC):
        raise DataError("is not a .vqz file; expected what scripts/encode.py writes")
    if len(content) < _PREFIX.size + _CHECKSUM.size:
        raise DataError(f"is truncated: {len(content)} bytes; {_ADVICE}")
    _, version, length = _PREFIX.unpack_from(content)
    if version not in (SIMPLE, BY_PRIOR):
        raise DataError(
            f"is of version {version}; expected {SIMPLE} or {BY_PRIOR}: use the vqvae_jax that wrote it, or a newer one"
        )
    body = memoryview(content)
    try:
        if version == SIMPLE:
            body = _checked(body, len(body) - _CHECKSUM.size)
        header = _read_header(_inflate(body[_PREFIX.size :][:length], _MAX_HEADER))
        start = _PREFIX.size + length
        if version == SIMPLE:
            return _parse_simple(header, body[start:], len(content))
        nifti = _natural(header.get("nifti"), len(body))
        _checked(body, start + nifti)
        file, lost = _parse_by_prior(header, body[start:], len(content), prior)
    except DataError as error:
        raise DataError(f"{error}; {_ADVICE}") from error
    if lost and not salvage:
        raise DataError(f"is damaged: {described(lost)} are lost; copy it again, or take the others with --salvage")
    return file


def save(path: Path, file: VqzFile, prior: PriorProgram | None = None) -> int:
    """Writes a .vqz file whole or not at all, and returns its size in bytes. Raises DataError if it cannot."""
    try:
        content = to_bytes(file, prior)
        write_whole(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return len(content)


def is_by_prior(path: Path) -> bool:
    """Whether a .vqz file's codes are coded by a prior."""
    with path.open("rb") as file:
        return _PREFIX.unpack(file.read(_PREFIX.size))[1] == BY_PRIOR


def load(path: Path, prior: PriorProgram | None = None, *, salvage: bool = False) -> VqzFile:
    """Reads a .vqz file. Raises DataError, with the file's name, as ``from_bytes`` does."""
    try:
        if path.is_fifo():  # which would be waited for
            raise DataError("is a pipe; expected a file")
        return from_bytes(path.read_bytes(), prior, salvage=salvage)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _least_size(shape: tuple[int, ...], indices: tuple[int, ...], num_embeddings: int) -> int:
    """Bytes that a file with so many voxels, and indices of such a shape and K, has at least."""
    work = indices[0] * WORK_PER_GRID + math.prod(indices) * (WORK_PER_CODE + num_embeddings)
    return max(-(-work // MAX_WORK_PER_BYTE), -(-math.prod(shape) // MAX_VOXELS_PER_BYTE))


def _least_size_by_prior(shape: tuple[int, ...], indices: tuple[int, ...]) -> int:
    return max(-(-math.prod(indices) // MAX_CODES_PER_BYTE), -(-math.prod(shape) // MAX_VOXELS_PER_BYTE))


def _with_checksum(content: bytes) -> bytes:
    return content + _CHECKSUM.pack(zlib.crc32(content))


def _checked(body: memoryview, length: int) -> memoryview:
    """The first ``length`` bytes, whose checksum follows them."""
    end = length + _CHECKSUM.size
    if length < 0 or len(body) < end or zlib.crc32(body[:length]) != _CHECKSUM.unpack(body[length:end])[0]:
        raise DataError("is truncated or altered (its checksum does not match)")
    return body[:length]


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Described:
    """What the header says, and the NIfTI header."""

    shape: tuple[int, int, int]
    indices_shape: tuple[int, int, int]
    num_embeddings: int
    ranges: np.ndarray
    slice_axis: int | None
    fingerprint: str
    nifti: bytes

    def file(self, indices: np.ndarray, lost: Sequence[int] = ()) -> VqzFile:
        encoded = EncodedNifti(EncodedImages(indices, self.shape, self.ranges), self.nifti, self.slice_axis)
        return VqzFile(encoded, self.num_embeddings, self.fingerprint, tuple(lost))


def _parse_simple(header: dict[str, Any], body: memoryview, size: int) -> VqzFile:
    found, body = _parse_beginning(header, body, size, SIMPLE)
    classes = entropy.classes_from_text(_typed(header.get("classes"), str, "text"), found.num_embeddings)
    length = _natural(header.get("bytes"), len(body))
    indices = entropy.decode(bytes(body[:length]), found.indices_shape, classes)
    if any(body[length:]):
        raise DataError("holds bytes beyond its codes")
    return found.file(indices)


def _parse_by_prior(
    header: dict[str, Any], body: memoryview, size: int, program: PriorProgram | None
) -> tuple[VqzFile, list[int]]:
    """The file, and the numbers of the slices that are lost."""
    lengths = [_natural(length, 2**31) for length in _typed(header.get("bytes"), list, "list")]
    found, body = _parse_beginning(header, body, size, BY_PRIOR)
    if len(lengths) != prior_coder.number_of_groups(found.shape[0]):
        raise DataError(f"has a damaged header ({len(lengths)} groups of codes for {found.shape[0]} slices)")
    _check_prior(_typed(header.get("prior"), str, "text"), found.num_embeddings, program)
    body = body[_CHECKSUM.size :]
    payloads: list[bytes | None] = []
    for length in lengths:
        try:
            payloads.append(bytes(_checked(body, length)))
        except DataError:
            payloads.append(None)
        body = body[length + _CHECKSUM.size :]
    indices, lost = prior_coder.decode(payloads, found.indices_shape, program)
    if any(body):
        raise DataError("holds bytes beyond its codes")
    lost = [number for number in range(found.shape[0]) if number // prior_coder.GROUP in lost]
    return found.file(indices, lost), lost


def _check_prior(fingerprint: str, num_embeddings: int, program: PriorProgram | None) -> None:
    own = "none" if program is None else program.prior.fingerprint[:PRIOR_DIGITS]
    if own != fingerprint or program.prior.num_embeddings != num_embeddings:
        raise DataError(
            f"was coded by another prior ({fingerprint[:PRIOR_DIGITS]}; this run's is {own}): give the --workdir that "
            "encoded it, with its folder prior as it was"
        )


def described(slices: Sequence[int]) -> str:
    """Runs of slices, counted from 1, for people."""
    starts = [number for number in slices if number - 1 not in slices]
    ends = [number for number in slices if number + 1 not in slices]
    return "slices " + ", ".join(f"{start + 1} to {end + 1}" for start, end in zip(starts, ends, strict=True))


def _parse_beginning(
    header: dict[str, Any], body: memoryview, size: int, version: int
) -> tuple[_Described, memoryview]:
    """What precedes the codes, of a file of this size, and the rest."""
    shape = _shape(header.get("shape"), 3)
    indices_shape = (shape[0], *_shape(header.get("grid"), 2))
    num_embeddings = _natural(header.get("num_embeddings"), entropy.MAX_CODES, 2)
    least = _least_size(shape, indices_shape, num_embeddings)
    if size < (least if version == SIMPLE else _least_size_by_prior(shape, indices_shape)):
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
    return _Described(shape, indices_shape, num_embeddings, ranges, slice_axis, fingerprint, nifti), body


def _check_voxels(nifti: bytes, shape: tuple[int, int, int], slice_axis: int | None) -> None:
    """Raises DataError where this NIfTI header is impossible, or is not that of these slices."""
    count, *expected = shape
    expected.insert(2 if slice_axis is None else slice_axis, count)
    parse_header(nifti_write.parsed_header(nifti))
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


def _shape(value: Any, sides: int) -> tuple[int, ...]:
    found = [_natural(side, 2**31) for side in _typed(value, list, "shape")]
    if len(found) != sides or 0 in found:
        raise DataError(f"has a damaged header (expected a shape of {sides} sides, found {str(value)[:40]})")
    return tuple(found)
