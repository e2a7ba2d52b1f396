"""The .vqz file: whole or refused, with memory in proportion to its size."""

import base64
import dataclasses
import json
import os
import struct
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest

from vqvae_jax import codes
from vqvae_jax.errors import DataError
from vqvae_jax.inference import Codes, NiftiCodes

MEMORY_LIMIT = 16 << 20
"""For files of a kilobyte: what one level's counts may take (8 MiB), and as much again."""


def nifti_header(shape, extension=0):
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header["vox_offset"] = 352 + extension
    return header.binaryblock + bytes(4 + extension)


def example(slices=3, levels=1, num_codes=50, grid=(8, 6), shape=(32, 24), **changes):
    rng = np.random.default_rng(0)
    stored = [rng.integers(0, num_codes, (slices, grid[0] >> n, grid[1] >> n)).astype(np.int32) for n in range(levels)]
    ranges = np.broadcast_to(np.float32([0.1, 437.3]), (slices, 2))
    content = Codes(**{"levels": tuple(stored), "shape": (slices, *shape), "ranges": ranges} | changes)
    return codes.CodeFile(NiftiCodes(content, nifti_header((*shape, slices)), 2), (num_codes,) * levels, "0123abcd")


def assert_same(one, other):
    assert (one.num_codes, one.fingerprint) == (other.num_codes, other.fingerprint)
    assert (one.codes.header, one.codes.slice_axis) == (other.codes.header, other.codes.slice_axis)
    assert one.codes.codes.shape == other.codes.codes.shape
    np.testing.assert_array_equal(one.codes.codes.ranges, other.codes.codes.ranges, strict=True)
    for left, right in zip(one.codes.codes.levels, other.codes.codes.levels, strict=True):
        np.testing.assert_array_equal(left, right, strict=True)


def with_checksum(body):
    return body + struct.pack("<I", zlib.crc32(body))


def forged(content, change):
    """The same file with another header, its checksum made good."""
    length = struct.unpack_from("<I", content, 10)[0]
    header = json.loads(zlib.decompress(content[14 : 14 + length]))
    text = change(header)
    deflated = zlib.compress(text if isinstance(text, bytes) else json.dumps(header).encode(), 9)
    body = content[:10] + struct.pack("<I", len(deflated)) + deflated + content[14 + length : -4]
    return with_checksum(body)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(("slices", "num_codes"), [(1, 2), (3, 50), (4, 2**16)])
def test_what_was_saved_is_loaded(tmp_path, slices, num_codes, levels):
    file = example(slices, levels, num_codes)
    size = codes.save(tmp_path / "a.vqz", file)
    assert size == (tmp_path / "a.vqz").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["a.vqz"]
    assert_same(codes.load(tmp_path / "a.vqz"), file)


def test_ranges_of_each_slice_are_kept():
    file = example(ranges=np.float32([[0, 1], [-1.5, 7e30], [3, 3]]))
    assert_same(codes.from_bytes(codes.to_bytes(file)), file)


def test_a_file_of_one_slice_and_a_long_nifti_header():
    file = example(slices=1)
    file = dataclasses.replace(file, codes=NiftiCodes(file.codes.codes, nifti_header((32, 24), 10**6), None))
    assert_same(codes.from_bytes(codes.to_bytes(file)), file)


@pytest.mark.parametrize(
    ("grid", "shape", "size"),
    [((100, 75), (1600, 1200), 3 * 1600 * 1200 / 1032), ((500, 400), (500, 400), (600000 * 4146 + 3 * 2**20) / 2**18)],
)
def test_a_file_is_padded_to_what_its_size_must_justify(grid, shape, size):
    file = example(shape=shape, levels=1, grid=grid)
    file.codes.codes.levels[0][:] = 7
    content = codes.to_bytes(file)
    assert len(content) == np.ceil(size)
    assert_same(codes.from_bytes(content), file)


def test_every_truncation_is_refused():
    content = codes.to_bytes(example())
    for length in range(len(content)):
        with pytest.raises(DataError, match=r"not a \.vqz file|truncated"):
            codes.from_bytes(content[:length])


def test_every_altered_byte_is_refused():
    content = bytearray(codes.to_bytes(example()))
    for place in range(len(content)):
        content[place] ^= 1 + place % 255
        with pytest.raises(DataError):
            codes.from_bytes(bytes(content))
        content[place] ^= 1 + place % 255


def test_hostile_files_are_refused_or_read_with_bounded_memory():
    """Bytes and header fields changed at random, the checksum made good: 600 files, one DataError or one content."""
    rng = np.random.default_rng(7)
    content = codes.to_bytes(example(levels=2))
    values = [-1, 0, 1, 3, 2**16, 2**31, 2**63, 1e300, None, True, "", "A" * 100, [], [0], [2**20] * 3, {}, [{}], "00"]

    def mutate_bytes():
        body = bytearray(content[:-4])
        for place in rng.integers(0, len(body), rng.integers(1, 4)):
            body[place] = rng.integers(0, 256)
        return with_checksum(bytes(body[: rng.integers(10, len(body))] if rng.random() < 0.2 else body))

    def mutate_header():
        def change(header):
            place = header if rng.random() < 0.5 else header["levels"][rng.integers(0, 2)]
            place[list(place)[rng.integers(0, len(place))]] = values[rng.integers(0, len(values))]

        return forged(content, change)

    read = 0
    tracemalloc.start()
    for mutate in [mutate_bytes] * 300 + [mutate_header] * 300:
        try:
            file = codes.from_bytes(mutate())
        except DataError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 300
        else:
            read += 1
            for level, num_codes in zip(file.codes.codes.levels, file.num_codes, strict=True):
                assert 0 <= level.min() <= level.max() < num_codes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_LIMIT
    assert read < 300


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda header: header.update(shape=[2**30, 2**30, 2**30]), "levels"),
        (lambda header: header.update(shape=[3, 2**20, 2**20]), "more than"),
        (lambda header: header["levels"][0].update(shape=[3, 2**15, 2**15]), "more than"),
        (lambda header: header["levels"][0].update(codes=1), "2 to 65536"),
        (lambda header: header["levels"][0].update(codes=2**17), "2 to 65536"),
        (lambda header: header["levels"][0].update(codes=2**16, classes="f" * 2**16), "classes"),
        (lambda header: header.update(levels=header["levels"] * 3), "levels"),
        (lambda header: header.update(slice_axis=3), "0 to 2"),
        (lambda header: header.update(slice_axis=0), "axis 0 of a volume"),
        (lambda header: header.update(shape=[3, 24, 32]), "of a volume"),
        (lambda header: header.update(ranges="!"), "base64"),
        (lambda header: header.update(ranges=base64.b64encode(np.float32([1, 0])).decode()), "ranges"),
        (lambda header: header.update(ranges=base64.b64encode(np.float32([0, np.nan])).decode()), "ranges"),
        (lambda header: header.update(ranges=""), "ranges"),
        (lambda header: header.update(model="../x\nfine"), "model"),
        (lambda header: header.pop("nifti"), "whole number"),
        (lambda header: header.update(nifti=10), "damaged header"),
        (lambda header: b"[" * 100_000, "JSON"),
        (lambda header: b"[]", "object"),
        (lambda header: b"1" * 5000, "JSON"),
        (lambda header: b" " * 10**8, "length"),
    ],
)
def test_a_header_that_cannot_be_is_refused(change, word):
    content = forged(codes.to_bytes(example()), change)
    tracemalloc.start()
    with pytest.raises(DataError, match=word):
        codes.from_bytes(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_LIMIT


def test_a_newer_version_is_named():
    content = codes.to_bytes(example())
    with pytest.raises(DataError, match="version 2; expected 1"):
        codes.from_bytes(with_checksum(content[:8] + b"\x02\x00" + content[10:-4]))


@pytest.mark.parametrize("name", ["absent.vqz", "folder.vqz", "text.vqz"])
def test_loading_names_the_file(tmp_path, name):
    (tmp_path / "folder.vqz").mkdir()
    (tmp_path / "text.vqz").write_text("no codes")
    with pytest.raises(DataError, match=name):
        codes.load(tmp_path / name)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "a.vqz").write_bytes(b"before")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        codes.save(tmp_path / "a.vqz", example())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
