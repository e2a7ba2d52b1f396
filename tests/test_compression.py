"""A NIfTI file through .vqz and back: what reconstruct gives, or one line that says why not."""

import dataclasses
import gzip

import nibabel
import numpy as np
import pytest
from conftest import REAL_DATA

import vqvae_jax
from vqvae_jax import codes, compression, entropy
from vqvae_jax.errors import DataError


@pytest.fixture(scope="module")
def run(tiny_run):
    return vqvae_jax.load(tiny_run[0] / "runs/tiny")


@pytest.fixture
def volume(tmp_path):
    """A big-endian volume of 5 slices of 30 x 20 voxels, 3 mm apart along the second axis."""
    voxels = np.random.default_rng(0).gamma(2, 200, (30, 5, 20)).astype(">i2")
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(voxels.dtype)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.5, 3, 0.5, 1]), header), tmp_path / "in.nii.gz")
    return tmp_path / "in.nii.gz"


def test_decoded_is_reconstructed_bit_for_bit(run, volume):
    made = compression.encode_file(run, volume, volume.with_name("a.vqz"))
    compression.decode_file(run, volume.with_name("a.vqz"), volume.with_name("a.nii"))
    run.reconstruct_nifti(volume, volume.with_name("b.nii"))
    assert volume.with_name("a.nii").read_bytes() == volume.with_name("b.nii").read_bytes()
    assert made.slice_axis == 1
    assert codes.load(volume.with_name("a.vqz")).codes.codes.levels[0].shape == (5, 8, 5)


def test_sizes_are_true(run, volume):
    made = compression.encode_file(run, volume, volume.with_name("a.vqz"))
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


def test_another_model_is_refused_unless_forced(run, volume):
    stored, out = volume.with_name("a.vqz"), volume.with_name("a.nii")
    compression.encode_file(run, volume, stored)
    file = codes.load(stored)
    codes.save(stored, dataclasses.replace(file, fingerprint="00ff" * 16))
    with pytest.raises(DataError, match=r"a\.vqz: was encoded by another model \(00ff.*--force"):
        compression.decode_file(run, stored, out)
    assert not out.exists()
    compression.decode_file(run, stored, out, force=True)
    assert nibabel.load(out).shape == (30, 5, 20)


@pytest.mark.parametrize("change", ["kinds of codes", "levels", "grid"])
def test_codes_that_do_not_fit_are_refused_even_if_forced(run, volume, change):
    stored, out = volume.with_name("a.vqz"), volume.with_name("a.nii")
    compression.encode_file(run, volume, stored)
    file = codes.load(stored)
    levels = file.codes.codes.levels
    if change == "kinds of codes":
        file = dataclasses.replace(file, num_codes=(64,))
    else:
        levels = levels * 2 if change == "levels" else (levels[0][:, :7],)
        nifti = dataclasses.replace(file.codes, codes=dataclasses.replace(file.codes.codes, levels=levels))
        file = dataclasses.replace(file, codes=nifti, num_codes=file.num_codes * len(levels))
    codes.save(stored, file)
    with pytest.raises(DataError, match=r"a\.vqz: .*model"):
        compression.decode_file(run, stored, out, force=True)
    assert not out.exists()


def test_files_are_replaced_only_if_asked(run, volume):
    stored, out = volume.with_name("a.vqz"), volume.with_name("a.nii.gz")
    compression.encode_file(run, volume, stored)
    compression.decode_file(run, stored, out)
    before = stored.read_bytes(), out.read_bytes()
    with pytest.raises(DataError, match=r"a\.vqz: exists.*--overwrite"):
        compression.encode_file(run, volume, stored)
    with pytest.raises(DataError, match=r"a\.nii\.gz: exists.*--overwrite"):
        compression.decode_file(run, stored, out)
    compression.encode_file(run, volume, stored, overwrite=True)
    compression.decode_file(run, stored, out, overwrite=True)
    assert (stored.read_bytes(), out.read_bytes()) == before


@pytest.mark.parametrize("name", ["out", "out.nii", ".vqz"])
def test_a_name_that_does_not_say_vqz_is_refused(run, volume, name):
    with pytest.raises(DataError, match=r"ends in \.vqz"):
        compression.encode_file(run, volume, volume.with_name(name))


def test_more_codes_than_a_file_may_have_are_refused(run, volume, tmp_path, monkeypatch):
    monkeypatch.setattr(entropy, "MAX_CODES", run.config.model.num_codes - 1)
    with pytest.raises(DataError, match="kinds of codes"):
        compression.encode_file(run, volume, tmp_path / "a.vqz")
    assert not (tmp_path / "a.vqz").exists()


@pytest.mark.slow
def test_real_volumes(run, tmp_path):
    path = REAL_DATA / "prostatex/volumes/prostatex_0001_t2tsecor.nii.gz"
    if not path.is_file():
        pytest.skip("needs the real volumes beside the repository")
    made = compression.encode_file(run, path, tmp_path / "a.vqz")
    compression.decode_file(run, tmp_path / "a.vqz", tmp_path / "a.nii")
    original, decoded = nibabel.load(path), nibabel.load(tmp_path / "a.nii")
    assert decoded.header == original.header
    np.testing.assert_array_equal(decoded.affine, original.affine)
    assert 0 < made.bits_per_pixel < 5 / 16  # 32 codes, one for 16 pixels
