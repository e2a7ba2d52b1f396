"""The .vqz file: whole or refused, with memory in proportion to its size."""

import base64
import dataclasses
import json
import os
import re
import struct
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest
from conftest import ROOT

from vqvae_jax.coding import vqz
from vqvae_jax.coding.encoded import EncodedImages, EncodedNifti
from vqvae_jax.errors import DataError

MEMORY_LIMIT = 16 << 20
"""For files of a kilobyte: what the counts may take (8 MiB), and as much again."""


def nifti_header(shape, extension=0):
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header["vox_offset"] = 352 + extension
    return header.binaryblock + bytes(4 + extension)


def example(slices=3, num_embeddings=50, grid=(8, 6), shape=(32, 24), **changes):
    indices = np.random.default_rng(0).integers(0, num_embeddings, (slices, *grid)).astype(np.int32)
    ranges = np.broadcast_to(np.float32([0.1, 437.3]), (slices, 2))
    images = EncodedImages(**{"indices": indices, "shape": (slices, *shape), "ranges": ranges} | changes)
    return vqz.VqzFile(EncodedNifti(images, nifti_header((*shape, slices)), 2), num_embeddings, "0123abcd")


def assert_same(one, other):
    assert (one.num_embeddings, one.fingerprint) == (other.num_embeddings, other.fingerprint)
    assert (one.encoded.header, one.encoded.slice_axis) == (other.encoded.header, other.encoded.slice_axis)
    assert one.encoded.images.shape == other.encoded.images.shape
    for name in ("ranges", "indices"):
        left, right = (getattr(file.encoded.images, name) for file in (one, other))
        np.testing.assert_array_equal(left, right, strict=True)


def with_checksum(body):
    return body + struct.pack("<I", zlib.crc32(body))


def header_of(content):
    """The header, and its bytes as it lies in the file."""
    length = struct.unpack_from("<I", content, 10)[0]
    return json.loads(zlib.decompress(content[14 : 14 + length])), length


def forged(content, change):
    """The same file with another header, its checksum made good."""
    header, length = header_of(content)
    text = change(header)
    deflated = zlib.compress(text if isinstance(text, bytes) else json.dumps(header).encode(), 9)
    body = content[:10] + struct.pack("<I", len(deflated)) + deflated + content[14 + length : -4]
    return with_checksum(body)


@pytest.mark.parametrize(("slices", "num_embeddings"), [(1, 2), (3, 50), (4, 2**16)])
def test_what_was_saved_is_loaded(tmp_path, slices, num_embeddings):
    file = example(slices, num_embeddings)
    size = vqz.save(tmp_path / "a.vqz", file)
    assert size == (tmp_path / "a.vqz").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["a.vqz"]
    assert_same(vqz.load(tmp_path / "a.vqz"), file)


def test_the_header_has_the_keys_that_the_description_names():
    table = (ROOT / "docs/vqz.md").read_text().split("## Header")[1].split("## ")[0]
    assert sorted(header_of(vqz.to_bytes(example()))[0]) == sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_ranges_of_each_slice_are_kept():
    file = example(ranges=np.float32([[0, 1], [-1.5, 7e30], [3, 3]]))
    assert_same(vqz.from_bytes(vqz.to_bytes(file)), file)


def test_a_file_of_one_slice_and_a_long_nifti_header():
    file = example(slices=1)
    encoded = EncodedNifti(file.encoded.images, nifti_header((32, 24), 10**6), None)
    file = dataclasses.replace(file, encoded=encoded)
    assert_same(vqz.from_bytes(vqz.to_bytes(file)), file)


@pytest.mark.parametrize(
    ("grid", "shape", "size"),
    [((100, 75), (1600, 1200), 3 * 1600 * 1200 / 1032), ((500, 400), (500, 400), (600000 * 4146 + 3 * 2**20) / 2**18)],
)
def test_a_file_is_padded_to_what_its_size_must_justify(grid, shape, size):
    file = example(shape=shape, grid=grid)
    file.encoded.images.indices[:] = 7
    content = vqz.to_bytes(file)
    assert len(content) == np.ceil(size)
    assert_same(vqz.from_bytes(content), file)


def test_every_truncation_is_refused():
    content = vqz.to_bytes(example())
    for length in range(len(content)):
        with pytest.raises(DataError, match=r"not a \.vqz file|truncated"):
            vqz.from_bytes(content[:length])


def test_every_altered_byte_is_refused():
    content = bytearray(vqz.to_bytes(example()))
    for place in range(len(content)):
        content[place] ^= 1 + place % 255
        with pytest.raises(DataError):
            vqz.from_bytes(bytes(content))
        content[place] ^= 1 + place % 255


def test_hostile_files_are_refused_or_read_with_bounded_memory():
    """Bytes and header fields changed at random, the checksum made good: 600 files, one DataError or one content."""
    rng = np.random.default_rng(7)
    content = vqz.to_bytes(example())
    values = [-1, 0, 1, 3, 2**16, 2**31, 2**63, 1e300, None, True, "", "A" * 100, [], [0], [2**20] * 3, {}, [{}], "00"]

    def mutate_bytes():
        body = bytearray(content[:-4])
        for place in rng.integers(0, len(body), rng.integers(1, 4)):
            body[place] = rng.integers(0, 256)
        return with_checksum(bytes(body[: rng.integers(10, len(body))] if rng.random() < 0.2 else body))

    def mutate_header():
        def change(header):
            header[list(header)[rng.integers(0, len(header))]] = values[rng.integers(0, len(values))]

        return forged(content, change)

    read = 0
    tracemalloc.start()
    for mutate in [mutate_bytes] * 300 + [mutate_header] * 300:
        try:
            file = vqz.from_bytes(mutate())
        except DataError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 300
        else:
            read += 1
            indices = file.encoded.images.indices
            assert 0 <= indices.min() <= indices.max() < file.num_embeddings
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_LIMIT
    assert read < 300


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda header: header.update(shape=[2**30, 2**30, 2**30]), "more than"),
        (lambda header: header.update(shape=[3, 2**20, 2**20]), "more than"),
        (lambda header: header.update(shape=[3, 32]), "3 sides"),
        (lambda header: header.update(shape=[3, 32, 0]), "3 sides"),
        (lambda header: header.update(grid=[2**15, 2**15]), "more than"),
        (lambda header: header.update(grid=[3, 8, 6]), "2 sides"),
        (lambda header: header.update(grid=8), "expected shape"),
        (lambda header: header.pop("grid"), "expected shape"),
        (lambda header: header.update(num_embeddings=1), "2 to 65536"),
        (lambda header: header.update(num_embeddings=2**17), "2 to 65536"),
        (lambda header: header.update(num_embeddings=[50]), "whole number"),
        (lambda header: header.update(num_embeddings=2**16, classes="f" * 2**16), "classes"),
        (lambda header: header.update(classes="0" * 51), "classes"),
        (lambda header: header.update(bytes=2**20), "0 to"),
        (lambda header: header.update(bytes=0), "beyond its codes"),
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
    content = forged(vqz.to_bytes(example()), change)
    tracemalloc.start()
    with pytest.raises(DataError, match=word):
        vqz.from_bytes(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_LIMIT


@pytest.mark.parametrize("axes", [0, 8, -1])
def test_an_impossible_nifti_header_is_refused_although_the_checksum_is_right(axes):
    file = example()
    nifti = bytearray(file.encoded.header)
    nifti[40:42] = struct.pack("<h", axes)  # dim[0]
    encoded = dataclasses.replace(file.encoded, header=bytes(nifti))
    content = vqz.to_bytes(dataclasses.replace(file, encoded=encoded))
    assert struct.unpack("<I", content[-4:])[0] == zlib.crc32(content[:-4])
    with pytest.raises(DataError, match="damaged header") as caught:
        vqz.from_bytes(content)
    assert "\n" not in str(caught.value)


def test_a_newer_version_is_named():
    content = vqz.to_bytes(example())
    with pytest.raises(DataError, match="version 3; expected 1 or 2"):
        vqz.from_bytes(with_checksum(content[:8] + b"\x03\x00" + content[10:-4]))


@pytest.mark.parametrize("name", ["absent.vqz", "folder.vqz", "text.vqz"])
def test_loading_names_the_file(tmp_path, name):
    (tmp_path / "folder.vqz").mkdir()
    (tmp_path / "text.vqz").write_text("no codes")
    with pytest.raises(DataError, match=name):
        vqz.load(tmp_path / name)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "a.vqz").write_bytes(b"before")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vqz.save(tmp_path / "a.vqz", example())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
