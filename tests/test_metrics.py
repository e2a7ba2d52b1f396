"""The metrics equal scikit-image's and NumPy's in float64, and keep their limits where nothing is left."""

import gzip
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqvae_jax import metrics

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SLICES = DATA / "prostatex" / "prostatex_keras_slices_data.zip"
SHAPE = (64, 48)


def reference_ssim(a, b, data_range=1.0):
    pairs = zip(np.asarray(a, np.float64), np.asarray(b, np.float64), strict=True)
    return np.array([structural_similarity(x, y, data_range=data_range) for x, y in pairs])


def noise(seed, scale=1.0, shape=(3, *SHAPE)):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def smooth(seed):
    field = gaussian_filter(noise(seed), (0, 8, 8))
    return (field - field.min()) / np.ptp(field)


def body_on_background(seed):
    """Zeros with tiny noise, but for a bright rectangle with a sharp border."""
    image = np.abs(noise(seed, 1e-4))
    image[:, 20:36, 12:30] = 0.7 + noise(seed, 0.05)[:, 20:36, 12:30]
    return image


RAMP = np.broadcast_to(np.linspace(0, 1, SHAPE[1]), (3, *SHAPE))
PAIRS = {
    "unrelated": (noise(0, 0.2) + 0.5, noise(1, 0.2) + 0.5),
    "noisy copy": (smooth(0), smooth(0) + noise(1, 0.03)),
    "smooth": (smooth(0), smooth(1)),
    "almost equal": (smooth(0), smooth(0) + noise(1, 1e-4)),
    "inverted": (smooth(0), 1 - smooth(0)),
    "ramp and its shift": (RAMP, RAMP + 0.01),
    "flat": (np.full((3, *SHAPE), 0.9), np.full((3, *SHAPE), 0.8)),
    "flat and equal": (np.full((3, *SHAPE), 0.9), np.full((3, *SHAPE), 0.9)),
    "nearly constant": (0.9 + noise(0, 1e-3), 0.9 + noise(1, 1e-3)),
    "far outside the range": (100 + noise(0, 0.03), 100 + noise(1, 0.03)),
    "mostly background": (body_on_background(0), body_on_background(1)),
    "background against zero": (body_on_background(0), np.zeros((3, *SHAPE))),
    "zero": (np.zeros((3, *SHAPE)), np.zeros((3, *SHAPE))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_ssim_equals_scikit_image(name):
    a, b = (np.asarray(x, np.float32) for x in PAIRS[name])
    np.testing.assert_allclose(metrics.ssim(a, b), reference_ssim(a, b), rtol=0, atol=1e-5)


@pytest.mark.parametrize("data_range", [0.01, 255.0, 4095.0])
def test_ssim_of_other_ranges(data_range):
    a, b = (np.asarray(data_range * x, np.float32) for x in PAIRS["noisy copy"])
    expected = reference_ssim(a, b, data_range)
    np.testing.assert_allclose(metrics.ssim(a, b, data_range=data_range), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 7), (7, 20), (20, 7), (33, 8)])
def test_ssim_at_the_smallest_sizes(shape):
    a, b = (np.float32(0.5 + noise(seed, 0.1, (2, *shape))) for seed in (0, 1))
    np.testing.assert_allclose(metrics.ssim(a, b), reference_ssim(a, b), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def real_slices():
    """Slices on their own grids, each scaled to [0, 1] by its 0.5 and 99.5 percentiles."""
    if not SLICES.exists():
        pytest.skip(f"no real slices: {SLICES} is absent")
    slices = []
    with zipfile.ZipFile(SLICES) as archive:
        members = [name for name in archive.namelist() if name.endswith(".nii.gz")]
        for name in members[::20]:
            image = nib.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))
            pixels = np.asarray(image.dataobj, np.float32).squeeze()
            low, high = np.percentile(pixels, (0.5, 99.5))
            slices.append(np.float32(np.clip((pixels - low) / (high - low), 0, 1)))
    return slices


@pytest.mark.parametrize("blur", [0.3, 1, 4])
def test_ssim_of_real_slices(real_slices, blur):
    for pixels in real_slices:
        a, b = pixels[None], gaussian_filter(pixels, blur)[None]
        np.testing.assert_allclose(metrics.ssim(a, b), reference_ssim(a, b), rtol=0, atol=1e-5)


def test_ssim_takes_a_channel_axis_and_is_symmetric():
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS["noisy copy"])
    np.testing.assert_array_equal(metrics.ssim(a[..., None], b[..., None]), metrics.ssim(a, b))
    np.testing.assert_allclose(metrics.ssim(b, a), metrics.ssim(a, b), rtol=1e-6)


def test_ssim_has_finite_gradients_where_images_are_flat():
    flat = jnp.zeros((1, *SHAPE))
    gradient = jax.grad(lambda a: metrics.ssim(a, flat).sum())(flat)
    assert np.isfinite(gradient).all()


def test_a_gradient_step_raises_ssim():
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS["unrelated"])
    gradient = jax.grad(lambda x: metrics.ssim(x, b).sum())(a)
    assert (metrics.ssim(a + gradient / jnp.abs(gradient).max() * 0.01, b) > metrics.ssim(a, b)).all()


def test_ssim_refuses_what_it_cannot_compare():
    image = jnp.zeros((2, 16, 16))
    with pytest.raises(ValueError, match=r"at least 7 x 7 pixels .* got 6 x 16"):
        metrics.ssim(image[:, :6], image[:, :6])
    with pytest.raises(ValueError, match=r"at least 7 x 7 pixels .* got 16 x 6"):
        metrics.ssim(image[:, :, :6], image[:, :, :6])
    with pytest.raises(ValueError, match="one shape"):
        metrics.ssim(image, image[:1])
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        metrics.ssim(image[0], image[0])
    with pytest.raises(ValueError, match=r"\[N, H, W, 1\]"):
        metrics.ssim(jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 16, 16, 3)))


@pytest.mark.parametrize("data_range", [1.0, 4095.0])
@pytest.mark.parametrize("name", ["unrelated", "noisy copy", "almost equal", "mostly background"])
def test_psnr_and_mae_equal_their_references(name, data_range):
    a, b = (np.asarray(data_range * x, np.float32) for x in PAIRS[name])
    exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
    expected = [peak_signal_noise_ratio(x, y, data_range=data_range) for x, y in zip(exact_a, exact_b, strict=True)]
    np.testing.assert_allclose(metrics.psnr(a, b, data_range=data_range), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.mae(a, b), np.abs(exact_a - exact_b).mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(metrics.mae(a[..., None], b[..., None]), metrics.mae(a, b), rtol=1e-6)


def test_identical_images_have_no_error():
    a = jnp.asarray(PAIRS["unrelated"][0], jnp.float32)
    assert np.isposinf(metrics.psnr(a, a)).all()
    np.testing.assert_array_equal(metrics.mae(a, a), 0)
    np.testing.assert_allclose(metrics.ssim(a, a), 1, rtol=1e-6)


def test_every_image_is_measured_alone():
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS["noisy copy"])
    spoilt = b.at[1].set(jnp.nan)
    for metric in (metrics.ssim, metrics.psnr, metrics.mae):
        np.testing.assert_array_equal(np.isnan(metric(a, spoilt)), [False, True, False])


def test_perplexity_counts_the_codes_in_equal_use():
    np.testing.assert_allclose(metrics.perplexity(jnp.full(512, 3)), 512, rtol=1e-5)
    np.testing.assert_allclose(metrics.perplexity(jnp.array([0, 9, 0, 9, 0])), 2, rtol=1e-6)
    np.testing.assert_allclose(metrics.perplexity(jnp.array([0, 7, 0])), 1, rtol=1e-6)


def test_perplexity_is_exp_of_the_entropy():
    counts = np.random.default_rng(0).integers(0, 2_000_000, 512)  # their sum is past float32's integers
    p = counts[counts > 0] / counts.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(metrics.perplexity(jnp.asarray(counts)), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.perplexity(jnp.asarray(counts / 1e9)), expected, rtol=1e-5)


def test_an_unused_codebook():
    counts = jnp.zeros(8, jnp.int32)
    assert metrics.perplexity(counts) == 0
    assert metrics.codebook_usage(counts) == 0


def test_codebook_usage_is_the_share_of_codes_met():
    counts = jnp.array([[0, 1, 0, 500], [1, 1, 2, 0]])
    np.testing.assert_array_equal(metrics.codebook_usage(counts), [0.5, 0.75])


@pytest.mark.parametrize("mask", [[True, True, False, False], [1, 1, 0, 0], [1.0, 1.0, 0.0, 0.0]])
def test_masked_mean_is_the_mean_of_real_images_whatever_the_padding_holds(mask):
    values = jnp.array([1.0, 4.0, jnp.nan, jnp.inf])
    assert metrics.masked_mean(values, jnp.array(mask)) == 2.5


def test_masked_mean_of_nothing_is_no_number():
    assert np.isnan(metrics.masked_mean(jnp.ones(3), jnp.zeros(3, bool)))
    with pytest.raises(ValueError, match="one shape"):
        metrics.masked_mean(jnp.ones(3), jnp.ones((3, 1)))
