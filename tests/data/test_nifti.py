"""Reading NIfTI of every kind, cutting volumes into slices, and refusing what is broken."""

import gzip
import io
import tracemalloc

import nibabel
import numpy as np
import pytest

from vqvae_jax.data import nifti, nifti_write
from vqvae_jax.errors import DataError

VERSIONS = {"1": nibabel.Nifti1Image, "2": nibabel.Nifti2Image}
AFFINE = np.array([[0, 0.8, 0, -30], [-1.2, 0, 0, 44], [0, 0, 3, 7], [0, 0, 0, 1.0]])
RNG = np.random.default_rng(0)


def to_bytes(voxels, *, dtype=None, version="1", order="<", slope=None):
    """A .nii file's content. ``slope`` is (scl_slope, scl_inter)."""
    header = VERSIONS[version].header_class(endianness=order)
    image = VERSIONS[version](voxels, AFFINE, header, dtype=dtype or voxels.dtype)
    if slope:
        image.header.set_slope_inter(*slope)
    return image.to_bytes()


def read(content):
    return nifti.read(io.BytesIO(content), len(content))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_any_number_type_byte_order_and_version(dtype, order, version, tmp_path):
    voxels = RNG.integers(0, 120, (9, 8)).astype(dtype)
    content = to_bytes(voxels, version=version, order=order)
    (tmp_path / "a.nii").write_bytes(content)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    for path in tmp_path.iterdir():
        volume = nifti.read(path)
        assert volume.voxels.dtype == np.float32
        np.testing.assert_array_equal(volume.voxels, voxels.astype(np.float32))
        np.testing.assert_allclose(volume.affine, AFFINE, rtol=1e-6)


@pytest.mark.parametrize("order", "<>")
def test_slope_and_intercept_are_applied(order):
    stored = RNG.integers(0, 1000, (9, 8))
    volume = read(to_bytes(stored, dtype="i2", order=order, slope=(2.5, -7)))
    np.testing.assert_array_equal(volume.voxels, (stored * 2.5 - 7).astype(np.float32))


@pytest.mark.parametrize("dtype", ["c8", "c16"])
def test_complex_voxels_become_magnitudes(dtype):
    voxels = np.full((9, 8), 3 - 4j, dtype)
    np.testing.assert_allclose(read(to_bytes(voxels)).voxels, 5)


@pytest.mark.parametrize("channels", ["RGB", "RGBA"])
@pytest.mark.parametrize("slope", [0, 1, 2])
def test_colours_become_luma_whatever_the_slope(channels, slope):
    voxels = np.zeros((9, 8), [(name, "u1") for name in channels])
    voxels["R"], voxels["G"] = 200, 100
    content = bytearray(to_bytes(voxels))
    content[112:116] = np.float32(slope).tobytes()  # scl_slope, which NIfTI says to ignore for RGB
    np.testing.assert_allclose(read(bytes(content)).voxels, 0.299 * 200 + 0.587 * 100, rtol=1e-6)


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 1), (9, 1, 8), (1, 9, 8), (9, 8, 1, 1), (1, 9, 8, 1, 1)])
@pytest.mark.parametrize("axis", [0, -1])
def test_an_axis_of_length_one_makes_it_one_slice(shape, axis):
    pixels = RNG.integers(0, 99, (9, 8)).astype(np.int16)
    (cut,) = nifti.slices(read(to_bytes(pixels.reshape(shape))), axis)
    np.testing.assert_array_equal(cut.pixels, pixels)


@pytest.mark.parametrize("axis", range(-3, 3))
def test_slices_of_a_volume_keep_voxels_and_place(axis):
    voxels = RNG.normal(size=(7, 8, 9)).astype(np.float32)
    affine = np.vstack([RNG.normal(size=(3, 4)), [0, 0, 0, 1]])
    cut = nifti.slices(nifti.Volume(voxels, affine), axis)
    assert len(cut) == voxels.shape[axis]
    for index, (row, column) in zip(range(len(cut)), RNG.integers(0, 7, (len(cut), 2)), strict=True):
        voxel = [row, column]
        voxel.insert(axis % 3, index)
        assert cut[index].pixels[row, column] == voxels[tuple(voxel)]
        np.testing.assert_allclose(cut[index].affine @ [row, column, 0, 1], affine @ [*voxel, 1])


@pytest.mark.parametrize(("shape", "axis"), [((6, 8), -1), ((8, 8, 6), 0), ((1, 1, 64), -1)])
def test_slices_too_small_to_evaluate_are_refused(shape, axis):
    with pytest.raises(DataError, match="at least 7 x 7"):
        nifti.slices(nifti.Volume(np.zeros(shape, np.float32), np.eye(4)), axis)


def with_voxel(value, dtype="f4"):
    voxels = np.ones((9, 8), dtype)
    voxels[3, 3] = value
    return to_bytes(voxels)


def with_header(offset, value, voxels=None):
    """A file whose header has ``value`` at ``offset`` (40 dim, 70 datatype, 108 vox_offset, 280 srow_x)."""
    content = bytearray(to_bytes(np.zeros((9, 8), np.int16) if voxels is None else voxels))
    content[offset : offset + len(value)] = value
    return bytes(content)


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


NOISE = to_bytes(RNG.integers(0, 999, (64, 64)).astype(np.int16))
HUGE = with_header(40, np.array([3, 32000, 32000, 32000], "<i2").tobytes())
BROKEN = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"this is no image\n" * 40, "is not a NIfTI file"),
    "short text": (b"hi", "is not a NIfTI file"),
    "truncated": (NOISE[:-1], "is truncated"),
    "header alone": (NOISE[:348], "is truncated"),
    "truncated gz": (gzip.compress(NOISE)[:-900], "is truncated"),
    "gz header alone": (gzip.compress(NOISE)[:5], "is truncated"),
    "flipped gz byte": (flipped(gzip.compress(NOISE, 0), 3000), "CRC"),
    "flipped gz checksum": (flipped(gzip.compress(NOISE), -8), "CRC"),
    "more than announced": (gzip.compress(NOISE + bytes(2**21)), "holds more than"),
    "1-D": (to_bytes(np.zeros(9, np.int16)), "is 1-D"),
    "4-D": (to_bytes(np.zeros((9, 8, 3, 2), np.int16)), r"is 4-D, of shape \(9, 8, 3, 2\)"),
    "NaN": (with_voxel(np.nan), "holds 1 voxels that are NaN"),
    "infinite": (with_voxel(-np.inf), "holds 1 voxels"),
    "beyond float32": (with_voxel(1e39, "f8"), "holds 1 voxels"),
    "huge": (HUGE, "is truncated"),
    "huge gz": (gzip.compress(HUGE), "is truncated"),
    "no voxels": (with_header(40, np.array([2, 0, 8], "<i2").tobytes()), "has no voxels"),
    "unknown type": (with_header(70, b"\xff\x7f"), "damaged header"),
    "offset not a number": (with_header(108, np.float32(np.nan).tobytes()), "damaged header"),
    "affine not finite": (with_header(280, np.float32(np.inf).tobytes()), "affine is not finite"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_with_a_reason_in_one_line(content, reason, tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    for attempt in (lambda: nifti.read(path), lambda: read(content)):
        with pytest.raises(DataError, match=reason) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be opened"):
        nifti.read(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("compress", "high", "shape", "announced"),
    [
        (bytes, 999, (256, 256), 60e9),
        (bytes, 999, (256, 256), 40e6),
        (gzip.compress, 999, (256, 256), 60e9),
        (gzip.compress, 999, (256, 256), 40e6),
        (gzip.compress, 1, (3000, 3000), 60e9),  # 18 MB of zeros in 18 kB, which cannot become 60 GB
    ],
)
def test_no_memory_is_taken_on_a_headers_word(compress, high, shape, announced):
    side, voxels = int((announced / 2) ** (1 / 3)), RNG.integers(0, high, shape, np.int16)
    content = compress(with_header(40, np.array([3, side, side, side], "<i2").tobytes(), voxels))
    tracemalloc.start()
    with pytest.raises(DataError, match="is truncated"):
        read(content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6


# Headers a rounding error away from right, and voxels outside a mask.


@pytest.mark.parametrize("excess", [1e-6, 1e-4])
def test_a_quaternion_a_rounding_error_beyond_1_is_read_and_kept(excess):
    """As ITK and the NIfTI library in C do; the header is written back as it was."""
    image = nibabel.Nifti1Image(RNG.integers(0, 99, (9, 8, 7)).astype(np.int16), np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(np.diag([-1.0, -1, 1, 1]), 1)  # half a turn: b, c, d = 0, 0, 1
    content = bytearray(image.to_bytes())
    content[256:268] = np.array([0.6, 0, 0.8 + excess], "<f4").tobytes()
    with pytest.raises(ValueError, match="w2"):
        nibabel.Nifti1Image.from_bytes(bytes(content))  # which is what the repair is for
    volume = read(bytes(content))
    turn = volume.affine[:3, :3]
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(turn[:, 1], [0, -1, 0], atol=1e-2)
    assert nifti.read_header(io.BytesIO(content)).affine.tolist() == volume.affine.tolist()
    assert nifti_write.to_bytes(volume.voxels, volume.header) == bytes(content)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_nan_voxels_are_refused_with_the_flag_that_reads_them_as_0(dtype):
    content = with_voxel(np.nan, dtype)
    with pytest.raises(DataError, match=r"holds 1 voxels that are NaN.*; --nan zero reads NaN as 0"):
        read(content)
    voxels = nifti.read(io.BytesIO(content), len(content), nan="zero").voxels
    expected = np.ones((9, 8))
    expected[3, 3] = 0
    np.testing.assert_array_equal(voxels, expected)


def test_infinite_voxels_are_refused_all_the_same():
    voxels = np.ones((9, 8), np.float32)
    voxels[0, 0], voxels[1, 1] = np.nan, np.inf
    content = to_bytes(voxels)
    with pytest.raises(DataError, match=r"holds 2 voxels .* of 72$"):
        read(content)
    with pytest.raises(DataError, match=r"holds 1 voxels .* of 72$"):
        nifti.read(io.BytesIO(content), len(content), nan="zero")
