"""Samples of a prior: drawn as it says, reproducible, and with what is kept kept."""

import jax
import nibabel
import numpy as np
import pytest
from conftest import run_script

import vqvae_jax
from vqvae_jax.errors import CheckpointError, ConfigError, DataError
from vqvae_jax.inference import sample_files, samples
from vqvae_jax.models.prior import Prior, init_prior
from vqvae_jax.models.prior_integers import PriorProgram, to_integers

CODES = 32
PRIOR = Prior(num_embeddings=CODES, channels=8, blocks=1, neighbours=2, grid=(8, 4))

pytestmark = pytest.mark.usefixtures("compile_fast")


def program(change=lambda name, leaf: leaf):
    variables = init_prior(PRIOR, jax.random.normal(jax.random.key(0), (CODES, 5)), jax.random.key(1))
    params = {name: change(name, leaf) for name, leaf in variables["params"].items()}
    return PriorProgram(to_integers(PRIOR, {"params": params}))


@pytest.fixture(scope="module")
def model(tiny_run, compile_fast):
    """The tiny run, with a prior that nobody trained."""
    found = vqvae_jax.load(tiny_run[0] / "runs/tiny")
    found.__dict__["prior"] = program(lambda name, leaf: 3 * leaf)
    return found


def drawn(of, count=400, known=None, **options):
    indices = np.full((count, 8, 4), 7, np.int32)
    known = np.zeros(indices.shape, bool) if known is None else known
    before, present = np.zeros((count, 2, 8, 4), np.int32), np.zeros((count, 2), bool)
    return samples.draw_codes(of, indices, known, before, present, rng=np.random.default_rng(0), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_codes_are_drawn_as_often_as_the_prior_says(temperature):
    """Of a prior that says the same of every code: by its bias alone."""
    bias = np.linspace(-2, 2, CODES).astype(np.float32)
    found = drawn(program(lambda name, leaf: leaf * 0 + (bias if name == "out_bias" else 0)), temperature=temperature)
    expected = np.exp(bias / temperature) / np.exp(bias / temperature).sum()
    shares = np.bincount(found.ravel(), minlength=CODES) / found.size
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(expected.max() / found.size))


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_known_codes_stay_and_all_others_are_drawn(steps):
    known = np.random.default_rng(1).random((20, 8, 4)) < 0.5
    known[0], known[1] = True, False
    found = drawn(program(), 20, known, steps=steps)
    assert (found[known] == 7).all()
    assert found.min() >= 0 and found.max() < CODES
    assert len(np.unique(found[~known])) > 1


def test_the_seed_fixes_the_samples(model):
    one, again, other = (samples.sample(model, 3, steps=3, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert one.shape == (3, 32, 16) and one.min() >= 0 and one.max() <= 1
    assert (one[0] != one[1]).any()


def test_a_volume_begins_as_a_slice_and_goes_on_given_what_came_before(model, monkeypatch):
    seen, draw = [], samples.draw_codes

    def watched(program, indices, known, before, present, **options):
        found = draw(program, indices, known, before, present, **options)
        seen.append((before[0].copy(), present[0].tolist(), found[0]))
        return found

    monkeypatch.setattr(samples, "draw_codes", watched)
    volume = samples.sample_volume(model, 3, steps=3)
    np.testing.assert_array_equal(volume[:1], samples.sample(model, 1, steps=3))
    assert [present for _, present, _ in seen[:3]] == [[False, False], [True, False], [True, True]]
    np.testing.assert_array_equal(seen[2][0], [seen[1][2], seen[0][2]])


def test_inpainting_keeps_what_is_kept(model):
    image = np.random.default_rng(0).gamma(2, 100, (30, 18))
    keep = np.ones((30, 18), bool)
    keep[9:21, 5:13] = False
    made = samples.inpaint(model, image, keep, 3, steps=4)
    np.testing.assert_array_equal(made[:, keep], np.broadcast_to(image[keep].astype(np.float32), (3, keep.sum())))
    assert (made[0][~keep] != made[1][~keep]).any()
    known = model.codes_within(keep)
    assert 0 < (~known).sum() < known.size
    encoded = model.encode(image).indices
    assert encoded.shape[1:] == known.shape


def test_what_cannot_be_drawn_is_told(model, tiny_run):
    image = np.zeros((30, 18))
    with pytest.raises(DataError, match="expected one shape"):
        samples.inpaint(model, image, np.zeros((3, 3), bool))
    with pytest.raises(DataError, match="keeps everything"):
        samples.inpaint(model, image, image == 0)
    for name, value in (("steps", 0), ("temperature", 0.0), ("temperature", float("nan")), ("seed", -1)):
        with pytest.raises(ConfigError, match=f"^--{name} is"):
            samples.sample(model, 1, **{name: value})
    with pytest.raises(CheckpointError, match=r"train one by scripts/train_prior\.py"):
        samples.sample(vqvae_jax.load(tiny_run[0] / "runs/tiny"), 1)


def test_files_are_written_whole_and_not_replaced(model, tmp_path):
    paths = sample_files.write_slices(model, tmp_path / "a", 11, steps=2)
    assert [path.name for path in paths][::10] == ["sample_00.nii.gz", "sample_10.nii.gz"]
    images = samples.sample(model, 11, steps=2)
    for path, image in zip(paths, images, strict=True):
        np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), image)
    assert (tmp_path / "a" / sample_files.PICTURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="exists"):
        sample_files.write_slices(model, tmp_path / "a", 11, steps=2)
    (volume,) = sample_files.write_volume(model, tmp_path / "b", 3, steps=2)
    assert nibabel.load(volume).shape == (32, 16, 3)


def test_an_inpainted_file_has_the_header_and_the_voxels_that_were_kept(model, tmp_path):
    voxels = np.random.default_rng(0).gamma(2, 100, (30, 18)).astype(np.int16)
    keep = np.ones((30, 18), np.uint8)
    keep[9:21, 5:13] = 0
    for name, array in (("in.nii", voxels), ("keep.nii", keep)):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([2, 3, 4, 1])), tmp_path / name)
    paths = sample_files.write_inpainted(
        model, tmp_path / "out", tmp_path / "in.nii", tmp_path / "keep.nii", 2, steps=2
    )
    found = nibabel.load(paths[1])
    np.testing.assert_array_equal(found.affine, np.diag([2, 3, 4, 1]))
    np.testing.assert_array_equal(np.asarray(found.dataobj)[keep > 0], voxels[keep > 0])
    nibabel.save(nibabel.Nifti1Image(keep[:9], np.eye(4)), tmp_path / "keep.nii")
    with pytest.raises(DataError, match=r"keep\.nii: a mask of shape"):
        sample_files.write_inpainted(model, tmp_path / "c", tmp_path / "in.nii", tmp_path / "keep.nii", 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--like", "a.nii"], "--like and --keep-mask go together"),
        (["--like", "a.nii", "--keep-mask", "b.nii", "--volume", 3], "cannot be combined"),
        ([], "train one by scripts/train_prior.py"),
    ],
)
def test_the_command_says_what_it_lacks(tiny_run, tmp_path, flags, words):
    done = run_script("sample.py", "--out", tmp_path / "out", "--platform", "cpu", *flags, cwd=tiny_run[0])
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1
