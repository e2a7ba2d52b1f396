"""Voxels written back: the file as it was but for its voxels, to nibabel and to SimpleITK alike."""

import gzip
import io

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from vqvae_jax.data import nifti, nifti_write
from vqvae_jax.errors import DataError

VERSIONS = {"1": nibabel.Nifti1Image, "2": nibabel.Nifti2Image}
RNG = np.random.default_rng(0)
TURN = np.linalg.qr(RNG.normal(size=(3, 3)))[0] * [0.5, 0.75, 3]
AFFINE = nibabel.affines.from_matvec(TURN, [-30, 44, 7])


def image(dtype="i2", *, version="1", order="<", slope=None, shape=(9, 8, 7)):
    """An image with something in every field that must survive. ``slope`` is (scl_slope, scl_inter)."""
    cls = VERSIONS[version]
    voxels = RNG.integers(0, 120, shape).astype(dtype)
    made = cls(voxels, AFFINE, cls.header_class(endianness=order), dtype=np.dtype(dtype))
    header = made.header
    header["descrip"] = b"T2 axial; TE=101"
    header.set_xyzt_units("mm", "sec")
    header.set_dim_info(1, 0, 2)
    header["cal_max"], header["intent_name"] = 99, b"anatomy"
    made.set_sform(AFFINE, 4)
    made.set_qform(AFFINE, 1)
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"kept as it is"))
    if slope:
        header.set_slope_inter(*slope)
    return made


def read(content):
    return nifti.read(io.BytesIO(content), len(content))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("slope", [None, (0.25, -8)])
def test_what_was_read_is_written_back_byte_for_byte(dtype, order, version, slope):
    content = image(dtype, version=version, order=order, slope=slope).to_bytes()
    volume = read(content)
    assert nifti_write.to_bytes(volume.voxels, volume.header) == content


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 1), (9, 1, 8), (9, 8, 7, 1, 1)])
def test_axes_of_length_one_are_kept(shape):
    volume = read(image(shape=shape).to_bytes())
    written = nibabel.Nifti1Image.from_bytes(nifti_write.to_bytes(volume.voxels, volume.header))
    assert written.shape == shape


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("order", "<>")
def test_geometry_is_the_same_in_nibabel_and_in_simpleitk(name, order, tmp_path):
    source, target = tmp_path / "in.nii.gz", tmp_path / "out" / name
    nibabel.save(image(order=order, slope=(2, 1)), source)
    volume = nifti.read(source)
    changed = volume.voxels[::-1] + 3
    nifti_write.write(target, changed, volume.header)
    assert (target.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    before, after = nibabel.load(source), nibabel.load(target)
    assert before.header == after.header
    np.testing.assert_array_equal(before.affine, after.affine)
    np.testing.assert_allclose(after.get_fdata(), changed, atol=1)
    before, after = sitk.ReadImage(str(source)), sitk.ReadImage(str(target))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelIDTypeAsString"):
        assert getattr(before, fact)() == getattr(after, fact)()
    assert after.GetMetaData("descrip") == "T2 axial; TE=101"
    np.testing.assert_allclose(sitk.GetArrayFromImage(after).T, changed, atol=1)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u8", "i8"])
@pytest.mark.parametrize(("slope", "inter"), [(1, 0), (0.5, 3), (-2, 10)])
def test_integers_are_rounded_and_clipped_to_their_type(dtype, slope, inter):
    header = read(image(dtype, slope=(slope, inter), shape=(8, 7)).to_bytes()).header
    wild = np.append(RNG.normal(40, 30, 54), [1e38, -1e38]).astype(np.float32).reshape(8, 7)
    stored = nibabel.Nifti1Image.from_bytes(nifti_write.to_bytes(wild, header)).dataobj.get_unscaled()
    limits = np.iinfo(dtype)
    expected = [min(max(round((float(x) - inter) / slope), limits.min), limits.max) for x in wild.ravel()]
    found = [int(x) for x in stored.ravel()]
    # Beside the largest 64-bit integers, float64 has only every 2048th at most.
    assert all(abs(a - b) <= (2048 if abs(b) > 2**53 else 0) for a, b in zip(found, expected, strict=True))


def test_a_difference_is_stored_in_float32_at_the_same_place():
    volume = read(image("u1", slope=(4, 7)).to_bytes())
    difference = RNG.normal(0, 1e3, volume.voxels.shape).astype(np.float32)
    written = nibabel.Nifti1Image.from_bytes(
        nifti_write.to_bytes(difference, nifti_write.float32_header(volume.header))
    )
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(written.dataobj), difference)
    np.testing.assert_array_equal(written.affine, volume.affine)
    assert written.header["descrip"] == b"T2 axial; TE=101"


def test_the_same_voxels_make_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    volume = read(image().to_bytes())
    contents = []
    for clock in (1e9, 2e9):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        nifti_write.write(tmp_path / "a.nii.gz", volume.voxels, volume.header, overwrite=True)
        contents.append((tmp_path / "a.nii.gz").read_bytes())
    assert contents[0] == contents[1]
    assert gzip.decompress(contents[0]) == image_bytes(volume)


def image_bytes(volume):
    return volume.header + volume.voxels.astype("<i2").tobytes(order="F")


@pytest.mark.parametrize(("kind", "dtype"), [("RGB", [(c, "u1") for c in "RGB"]), ("complex", "c8")])
def test_voxels_that_are_not_one_real_number_are_refused(kind, dtype):
    volume = read(nibabel.Nifti1Image(np.ones((9, 8), dtype), AFFINE).to_bytes())
    with pytest.raises(DataError, match=f"has {kind} voxels"):
        nifti_write.to_bytes(volume.voxels, volume.header)


@pytest.mark.parametrize("name", ["a.txt", "nii", ".nii", "a.nii.zip", "a"])
def test_names_of_other_formats_are_refused(name, tmp_path):
    volume = read(image().to_bytes())
    with pytest.raises(DataError, match=r"ends in \.nii or \.nii\.gz"):
        nifti_write.write(tmp_path / name, volume.voxels, volume.header)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_where_that_is_allowed(tmp_path):
    volume, path = read(image().to_bytes()), tmp_path / "a.nii"
    path.write_bytes(b"old")
    with pytest.raises(DataError, match=r"exists; .*--overwrite"):
        nifti_write.write(path, volume.voxels, volume.header)
    assert path.read_bytes() == b"old"
    nifti_write.write(path, volume.voxels, volume.header, overwrite=True)
    assert path.read_bytes() == image_bytes(volume)
    with pytest.raises(DataError, match="is a folder"):
        nifti_write.write(tmp_path / "b.nii", *named_folder(tmp_path, volume))


def named_folder(tmp_path, volume):
    (tmp_path / "b.nii").mkdir()
    return volume.voxels, volume.header


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    with pytest.raises(DataError, match=rf"^{tmp_path}/taken/b/a.nii: cannot be written: {tmp_path}/taken is a file"):
        nifti_write.check_target(tmp_path / "taken/b/a.nii")
    nifti_write.check_target(tmp_path / "new/b/a.nii")
    monkeypatch.setattr("os.access", lambda folder, mode: folder != tmp_path)
    with pytest.raises(DataError, match=rf"^{tmp_path}/new/a.nii: cannot be written: no permission .*{tmp_path};"):
        nifti_write.check_target(tmp_path / "new/a.nii")


@pytest.mark.parametrize("damage", [lambda h: h[:-4], lambda h: h + bytes(4), lambda h: h[:100], lambda h: b""])
def test_a_header_that_does_not_end_at_the_voxels_is_refused(damage):
    volume = read(image().to_bytes())
    with pytest.raises(DataError):
        nifti_write.to_bytes(volume.voxels, damage(volume.header))


def test_voxels_of_another_count_than_the_headers_are_refused():
    volume = read(image().to_bytes())
    with pytest.raises(DataError, match="are to be written"):
        nifti_write.to_bytes(volume.voxels[1:], volume.header)
