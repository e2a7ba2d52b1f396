"""Malformed NIfTI files: each is read as its header says, or refused in one line, in memory its content justifies."""

import faulthandler
import gzip
import io
import math
import os
import struct
import tracemalloc
import warnings
import zlib

import nibabel
import numpy as np
import pytest
from malformed_nifti import FIELDS, MAGIC, TYPES, field, malformed_file, order_of

from vqvae_jax.data import nifti
from vqvae_jax.errors import DataError

SEED = 2024
BYTES_PER_CONTENT_BYTE = 6
"""A uint8 voxel is kept as it was read and becomes 4 bytes; the rest is slack."""
CONSTANT_BYTES = 8e6
HANG_SECONDS_PER_1000 = 300
MAX_MESSAGE = 400


class Refused(Exception):
    """The reference finds the file invalid."""


def need(condition, why):
    if not condition:
        raise Refused(why)


def reference(content):
    """Voxels and affine by the standard's text, with NumPy alone; raises Refused where it gives none."""
    need(order_of(content), "sizeof_hdr")
    length, order = order_of(content)
    get = {name: field(content, length, order, name) for name in FIELDS[length]}
    need(get["magic"].tobytes()[:4] == MAGIC[length][:4], "magic")
    if length == 540:
        need(get["magic"].tobytes()[4:] in (MAGIC[540][4:], bytes(4)), "end of line")
    ndim = int(get["dim"][0])
    need(1 <= ndim <= 7, "dim[0]")
    shape = [int(side) for side in get["dim"][1 : ndim + 1]]
    need(min(shape) >= 1, "dim")
    need(int(get["datatype"][0]) in TYPES, "datatype")
    dtype = np.dtype(TYPES[int(get["datatype"][0])]).newbyteorder(order)
    offset = float(get["vox_offset"][0])
    need(length + 4 <= offset < 2**62, "vox_offset")
    need(len(content) >= int(offset) + math.prod(shape) * dtype.itemsize, "too short")
    stored = np.frombuffer(content, dtype, math.prod(shape), int(offset))
    slope, inter = float(get["scl_slope"][0]), float(get["scl_inter"][0])
    if math.isfinite(slope) and slope:
        need(math.isfinite(inter), "scl_inter")
    else:
        slope, inter = 1.0, 0.0
    if stored.ndim == 2:
        values = stored[:, :3] @ np.array([0.299, 0.587, 0.114])
    elif dtype.kind == "c":
        values = np.abs(stored.astype("c16") * slope + inter)
    else:
        values = stored.astype("f8") * slope + inter
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    need(len(shape) in (2, 3), "dimensions")
    need((np.abs(values) <= nifti.MAX_INTENSITY).all(), "voxels")
    affine = reference_affine(get)
    need(np.isfinite(affine).all(), "affine")
    return values.reshape(shape, order="F"), affine


def reference_affine(get):
    """sform, else qform, else voxel sizes about the centre; voxel sizes are made positive, 0 becomes 1."""
    affine = np.eye(4)
    size = np.abs(get["pixdim"][1:4].astype("f8"))
    size[size == 0] = 1
    if 1 <= get["sform_code"][0] <= 5:
        affine[:3] = get["srow"].reshape(3, 4)
    elif 1 <= get["qform_code"][0] <= 5:
        b, c, d = get["quatern"].astype("f8")
        need(b * b + c * c + d * d <= 1 + 1e-6, "quaternion")
        a = math.sqrt(max(0.0, 1 - (b * b + c * c + d * d)))
        rotation = [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
        affine[:3, :3] = rotation * size * [1, 1, -1 if get["pixdim"][0] == -1 else 1]
        affine[:3, 3] = get["qoffset"]
    else:
        ndim = min(3, int(get["dim"][0]))
        sides = np.array([*map(int, get["dim"][1 : ndim + 1]), 1, 1])[:3]
        size[ndim:] = 1
        affine[:3, :3] = np.diag(size * [-1, 1, 1])
        affine[:3, 3] = -(sides - 1) / 2 * size * [-1, 1, 1]
    return affine


def unzip(content):
    """What a .gz holds, as far as it can be read, and whether it is whole."""
    if content[:2] != b"\x1f\x8b":
        return content, True
    found, rest = [], content
    while rest:
        member = zlib.decompressobj(wbits=31)
        try:
            found.append(member.decompress(rest))
        except zlib.error:
            return b"".join(found), False
        if not member.eof:
            return b"".join(found), False
        rest = member.unused_data.lstrip(b"\0")
    return b"".join(found), True


def read(data, path):
    if path is None:
        return nifti.read(io.BytesIO(data), len(data))
    path.write_bytes(data)
    return nifti.read(path)


def complaints(data, path):
    """What is wrong with how ``data`` is read, a line each."""
    content, whole = unzip(data)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    volume = None
    with warnings.catch_warnings(record=True) as caught, np.errstate(all="warn"):
        warnings.simplefilter("always")
        try:
            volume = read(data, path)
        except DataError as error:
            message = str(error)
            if not (message.isprintable() and 5 < len(message) < MAX_MESSAGE):
                yield f"message {message!r}"
        except Exception as error:
            yield f"{type(error).__name__}: {error}"
            return
    _, peak = tracemalloc.get_traced_memory()
    if peak - before > BYTES_PER_CONTENT_BYTE * len(content) + CONSTANT_BYTES:
        yield f"took {peak - before} bytes for {len(content)}"
    if caught:
        yield f"warned: {caught[0].message}"
    with np.errstate(all="ignore"):
        try:
            need(whole and data, "gzip")
            voxels, affine = reference(content)
        except Refused as why:
            if volume is not None:
                yield f"read, though it is invalid: {why}"
            return
    if volume is None:
        if not ("holds more than" in message and len(content) > 1 << 20):
            yield f"refused, though it is valid: {message}"
        return
    if volume.voxels.shape != voxels.shape or not np.allclose(volume.voxels, voxels, rtol=1e-6, atol=1e-37):
        yield "other voxels than the bytes say"
    if not (np.abs(volume.affine - affine) <= 1e-5 * (1 + np.abs(affine).max(axis=0))).all():
        yield f"another affine than the header says: {volume.affine.tolist()}, not {affine.tolist()}"


@pytest.fixture
def memory():
    """Memory is traced."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_files_are_read_as_they_say_or_refused_in_one_line(count, tmp_path, caplog, memory):
    problems = []
    faulthandler.dump_traceback_later(HANG_SECONDS_PER_1000 * count // 1000, exit=True)
    try:
        for index in range(count):
            data, what = malformed_file(SEED, index)
            path = tmp_path / "a.nii.gz" if index % 2 else None
            problems += [f"file {index} ({what}): {line}" for line in complaints(data, path)]
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems[:40])
    assert not caplog.records  # nibabel reports what it repairs


def edited(version, name, *values, extension=b""):
    """A file of ones, 9 x 8, with one field changed."""
    image = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version](np.ones((9, 8), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    length, order = order_of(content)
    offset, kind, _ = FIELDS[length][name]
    packed = np.array(values, np.dtype(kind).newbyteorder(order)).tobytes()
    content[offset : offset + len(packed)] = packed
    return bytes(content[:length] + (extension or content[length : length + 4]) + content[length + 4 :])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("vox_offset", [0], "vox_offset is 0"),  # nibabel reads the header's bytes as voxels
        ("vox_offset", [351], "damaged header"),
        ("vox_offset", [-1], "damaged header"),
        ("magic", b"ni", "pair"),  # so it does here
        ("dim", [0, 9, 8], r"dim\[0\] is 0"),
        ("dim", [512, 9, 8], r"dim\[0\] is 512"),
        ("dim", [2, -9, 8], "no voxels"),
        ("datatype", [1536], "damaged header"),
        ("magic", b"xx", "damaged header"),
    ],
)
def test_a_header_that_gives_no_voxels_is_refused(version, name, values, reason):
    with pytest.raises(DataError, match=reason):
        read(edited(version, name, *values), None)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [-(2**31), -16, 0, 1, 16, 2**31 - 1])
def test_a_damaged_extension_costs_no_voxel(size, version):
    extension = b"\1\0\0\0" + struct.pack("<ii", size, 6) + bytes(8)
    start = {1: 348, 2: 540}[version] + len(extension)
    volume = read(edited(version, "vox_offset", start, extension=extension), None)
    np.testing.assert_array_equal(volume.voxels, np.ones((9, 8)))


@pytest.mark.parametrize("code", TYPES)
def test_a_whole_bomb_takes_little_more_than_its_voxels(code, memory):
    side = 256
    header = nibabel.Nifti2Header()
    header.set_data_shape((side, side, 32))
    header["datatype"], header["vox_offset"] = code, 544
    header.set_slope_inter(1e300, 1)
    size = side * side * 32 * np.dtype(TYPES[code]).itemsize
    data = gzip.compress(header.binaryblock + bytes(4 + size), 1)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    volume = read(data, None)
    _, peak = tracemalloc.get_traced_memory()
    assert volume.voxels.shape == (side, side, 32)
    assert peak - before < 2 * size + volume.voxels.nbytes + CONSTANT_BYTES


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.nii")
    faulthandler.dump_traceback_later(HANG_SECONDS_PER_1000, exit=True)
    with pytest.raises(DataError, match="is a pipe"):
        nifti.read(tmp_path / "a.nii")
    faulthandler.cancel_dump_traceback_later()
