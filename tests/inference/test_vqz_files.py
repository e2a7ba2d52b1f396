"""A NIfTI file through .vqz and back: what reconstruct gives, or one line that says why not."""

import dataclasses
import gzip

import nibabel
import numpy as np
import pytest
from conftest import REAL_DATA

import vqvae_jax
from vqvae_jax.coding import entropy, vqz
from vqvae_jax.errors import DataError
from vqvae_jax.inference import vqz_files
from vqvae_jax.inference.trained_model import TrainedModel


@pytest.fixture(scope="module")
def model(tiny_run):
    return vqvae_jax.load(tiny_run[0] / "runs/tiny")


@pytest.fixture
def volume(tmp_path):
    """A big-endian volume of 5 slices of 30 x 20 voxels, 3 mm apart along the second axis, which is head-foot."""
    voxels = np.random.default_rng(0).gamma(2, 200, (30, 5, 20)).astype(">i2")
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(voxels.dtype)
    affine = np.diag([0.5, 3, 0.5, 1])[[0, 2, 1, 3]]
    nibabel.save(nibabel.Nifti1Image(voxels, affine, header), tmp_path / "in.nii.gz")
    return tmp_path / "in.nii.gz"


def test_decoded_is_reconstructed_bit_for_bit(model, volume):
    made = vqz_files.encode_file(model, volume, volume.with_name("a.vqz"))
    vqz_files.decode_file(model, volume.with_name("a.vqz"), volume.with_name("a.nii"))
    model.reconstruct_nifti(volume, volume.with_name("b.nii"))
    assert volume.with_name("a.nii").read_bytes() == volume.with_name("b.nii").read_bytes()
    assert made.slice_axis == 1
    assert vqz.load(volume.with_name("a.vqz")).encoded.images.indices.shape == (5, 8, 5)


def test_sizes_are_true(model, volume):
    made = vqz_files.encode_file(model, volume, volume.with_name("a.vqz"))
    size = volume.with_name("a.vqz").stat().st_size
    stored = nibabel.load(volume).dataobj.get_unscaled()
    packed = gzip.compress(stored.astype(">i2").tobytes(order="F"), 6)
    assert made.bits_per_pixel == pytest.approx(8 * size / (30 * 5 * 20))
    assert made.gzip_size == len(packed)
    line = str(made)
    assert f"{8 * size / 3000:.4f} bits per pixel ({size} bytes)" in line
    assert f"{volume.stat().st_size / size:.1f} times smaller than the file" in line
    assert f"{len(packed) / size:.1f} times smaller than its voxels by gzip" in line
    assert "axis 1" in line


def test_another_model_is_refused_unless_forced(model, volume):
    stored, out = volume.with_name("a.vqz"), volume.with_name("a.nii")
    vqz_files.encode_file(model, volume, stored)
    file = vqz.load(stored)
    vqz.save(stored, dataclasses.replace(file, fingerprint="00ff" * 16))
    with pytest.raises(DataError, match=r"a\.vqz: was encoded by another model \(00ff.*--force"):
        vqz_files.decode_file(model, stored, out)
    assert not out.exists()
    vqz_files.decode_file(model, stored, out, force=True)
    assert nibabel.load(out).shape == (30, 5, 20)


@pytest.mark.parametrize("change", ["kinds of codes", "grid"])
def test_codes_that_do_not_fit_are_refused_even_if_forced(model, volume, change):
    stored, out = volume.with_name("a.vqz"), volume.with_name("a.nii")
    vqz_files.encode_file(model, volume, stored)
    file = vqz.load(stored)
    if change == "kinds of codes":
        file = dataclasses.replace(file, num_embeddings=64)
    else:
        images = dataclasses.replace(file.encoded.images, indices=file.encoded.images.indices[:, :7])
        file = dataclasses.replace(file, encoded=dataclasses.replace(file.encoded, images=images))
    vqz.save(stored, file)
    with pytest.raises(DataError, match=r"a\.vqz: .*model"):
        vqz_files.decode_file(model, stored, out, force=True)
    assert not out.exists()


def test_files_are_replaced_only_if_asked(model, volume):
    stored, out = volume.with_name("a.vqz"), volume.with_name("a.nii.gz")
    vqz_files.encode_file(model, volume, stored)
    vqz_files.decode_file(model, stored, out)
    before = stored.read_bytes(), out.read_bytes()
    with pytest.raises(DataError, match=r"a\.vqz: exists.*--overwrite"):
        vqz_files.encode_file(model, volume, stored)
    with pytest.raises(DataError, match=r"a\.nii\.gz: exists.*--overwrite"):
        vqz_files.decode_file(model, stored, out)
    vqz_files.encode_file(model, volume, stored, overwrite=True)
    vqz_files.decode_file(model, stored, out, overwrite=True)
    assert (stored.read_bytes(), out.read_bytes()) == before


def test_a_doubt_about_the_axis_is_handed_on(model, tmp_path):
    data = dataclasses.replace(model.config.data, slice_direction="head-foot")
    model = TrainedModel(dataclasses.replace(model.config, data=data), model._variables)
    voxels = np.random.default_rng(0).integers(0, 900, (20, 20, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, None), tmp_path / "lost.nii")
    made = vqz_files.encode_file(model, tmp_path / "lost.nii", tmp_path / "a.vqz")
    assert made.axis_doubt == "the header does not say which axis is head-foot"
    assert vqz_files.encode_file(model, tmp_path / "lost.nii", tmp_path / "b.vqz", slice_axis=2).axis_doubt == ""


@pytest.mark.parametrize("name", ["out", "out.nii", ".vqz"])
def test_a_name_that_does_not_say_vqz_is_refused(model, volume, name):
    with pytest.raises(DataError, match=r"ends in \.vqz"):
        vqz_files.encode_file(model, volume, volume.with_name(name))


def test_more_codes_than_a_file_may_have_are_refused(model, volume, tmp_path, monkeypatch):
    monkeypatch.setattr(entropy, "MAX_CODES", model.config.model.num_embeddings - 1)
    with pytest.raises(DataError, match="kinds of codes"):
        vqz_files.encode_file(model, volume, tmp_path / "a.vqz")
    assert not (tmp_path / "a.vqz").exists()


@pytest.mark.slow
def test_real_volumes(model, tmp_path):
    path = REAL_DATA / "prostatex/volumes/prostatex_0001_t2tsecor.nii.gz"
    if not path.is_file():
        pytest.skip("needs the real volumes beside the repository")
    made = vqz_files.encode_file(model, path, tmp_path / "a.vqz")
    vqz_files.decode_file(model, tmp_path / "a.vqz", tmp_path / "a.nii")
    original, decoded = nibabel.load(path), nibabel.load(tmp_path / "a.nii")
    assert decoded.header == original.header
    np.testing.assert_array_equal(decoded.affine, original.affine)
    assert 0 < made.bits_per_pixel < 5 / 16  # 32 codes, one for 16 pixels
