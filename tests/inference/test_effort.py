"""Codes chosen with effort: by hand where that can be done, fewer bits and less error where not."""

import jax
import nibabel
import numpy as np
import pytest
from conftest import run_script

import vqvae_jax
from vqvae_jax.coding import prior_coder
from vqvae_jax.config import PRESETS
from vqvae_jax.errors import CheckpointError
from vqvae_jax.inference.effort import Chooser, _distortion
from vqvae_jax.metrics.similarity import ssim
from vqvae_jax.models.prior import Prior, coding_order, init_prior
from vqvae_jax.models.prior_integers import PriorProgram, to_integers

CODES = 32
PRIOR = Prior(num_embeddings=CODES, channels=8, blocks=1, neighbours=2, grid=(8, 4))

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def model(tiny_run, compile_fast):
    """The tiny run, with a prior that nobody trained but that likes some codes."""
    found = vqvae_jax.load(tiny_run[0] / "runs/tiny")
    variables = init_prior(PRIOR, jax.random.normal(jax.random.key(0), (CODES, 5)), jax.random.key(1))
    params = variables["params"] | {"out_bias": 3 * jax.random.normal(jax.random.key(2), (CODES,))}
    found.__dict__["prior"] = PriorProgram(to_integers(PRIOR, {"params": params}))
    return found


def images(count=3):
    y, x = np.mgrid[:32, :16]
    waves = [0.5 + 0.4 * np.sin((x + i) / (3 + i)) * np.cos(y / 5) for i in range(count)]
    return np.stack(waves).astype(np.float32)


def chooser(model, weight):
    return Chooser(model.config, model._variables, model.prior, weight)


def objective(model, weight, image, grid, before=()):
    """Distortion + weight * bits a pixel, the bits in the coding order."""
    codes = np.stack([*before[::-1], grid]).astype(np.int32)
    bits = prior_coder.bits(codes, model.prior)[-1].sum()
    decoded = np.asarray(model._from_indices(model._variables, grid[None]))
    distortion = np.abs(decoded[0, ..., 0] - image).mean()
    distortion += model.config.loss.ssim_weight * (1 - float(ssim(decoded, image[None, ..., None])[0]))
    return distortion + weight * bits / image.size, bits


def test_bits_that_weigh_nothing_leave_the_nearest_codes(model):
    image = images(1)[0]
    nearest = model.encode(image, intensity_range=(0, 1)).indices[0]
    np.testing.assert_array_equal(chooser(model, 1e-12).choose(image[..., None], [], 1), nearest)


def test_bits_that_weigh_all_leave_the_likeliest_code_in_the_coding_order(model):
    image = images(1)[0]
    grid, order = np.zeros((8, 4), np.int32), coding_order(8, 4)
    context = model.prior.context(np.zeros((1, 2, 8, 4), np.int32), np.zeros((1, 2), bool))
    for number in np.unique(order):
        logits = model.prior.logits(grid[None], (order < number)[None], context)[0]
        grid[order == number] = logits[order == number].argmax(axis=1)
    np.testing.assert_array_equal(chooser(model, 1e6).choose(image[..., None], [], 1), grid)


def test_more_effort_is_a_better_bargain(model):
    weight, before = 0.3, []
    for image in images():
        nearest = model.encode(image, intensity_range=(0, 1)).indices[0]
        found = [nearest] + [chooser(model, weight).choose(image[..., None], before, effort) for effort in (1, 2, 3)]
        totals, bits = zip(*(objective(model, weight, image, grid, before) for grid in found), strict=True)
        assert bits[1] < bits[0]
        assert totals[2] < totals[0] and totals[3] <= totals[2] + 1e-3
        before = [found[0], *before]


def test_a_volume_is_chosen_slice_by_slice_given_those_before(model):
    volume = images()
    found = model.encode(volume, intensity_range=(0, 1), effort=1, volume=True).indices
    alone = model.encode(volume, intensity_range=(0, 1), effort=1).indices
    np.testing.assert_array_equal(found[0], alone[0])
    choose = Chooser(model.config, model._variables, model.prior).choose
    np.testing.assert_array_equal(found[2], choose(volume[2][..., None], [found[1], found[0]], 1))


def test_effort_needs_a_prior(tiny_run, tmp_path):
    place, _ = tiny_run
    with pytest.raises(CheckpointError, match=r"has no prior.*train_prior\.py"):
        vqvae_jax.load(place / "runs/tiny").encode(images(1), effort=2)
    nibabel.save(nibabel.Nifti1Image(images(1)[0], np.eye(4)), tmp_path / "one.nii")
    flags = ("--workdir", "runs/tiny", "--effort", 1)
    done = run_script("encode.py", tmp_path / "one.nii", tmp_path / "one.vqz", *flags, cwd=place)
    assert done.returncode != 0 and "has no prior" in done.stderr
    assert not (tmp_path / "one.vqz").exists()


def test_error_is_that_of_the_models_training():
    """By L2 after hipmri-psnr; after a training by L1 and features alone, as hipmri weighs L1 and SSIM."""
    image, other = images(2)[..., None]
    difference = other - image
    by_pixels = np.mean(difference**2) / 0.05
    with_ssim = np.abs(difference).mean() + 0.5 * (1 - float(ssim(other[None], image[None])[0]))
    expected = {"hipmri": with_ssim, "hipmri-psnr": by_pixels, "reference": with_ssim}
    for preset, value in expected.items():
        np.testing.assert_allclose(_distortion(PRESETS[preset], other[None], image[None]), [value], rtol=1e-5)
