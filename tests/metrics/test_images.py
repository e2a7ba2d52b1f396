"""Measures of images equal those of scikit-image, SciPy and NumPy in float64, and keep limits where nothing is left."""

import jax.numpy as jnp
import numpy as np
import pytest
from image_pairs import PAIRS, noise
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio

from vqvae_jax import metrics
from vqvae_jax.training import losses


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
    for metric in (metrics.ssim, metrics.psnr, metrics.mae, metrics.hfen):
        np.testing.assert_array_equal(np.isnan(metric(a, spoilt)), [False, True, False])


def reference_hfen(a, b):
    """With SciPy's own Laplacian of a Gaussian, cut to 15 x 15, less its mean."""
    impulse = np.zeros((15, 15))
    impulse[7, 7] = 1
    kernel = ndimage.gaussian_laplace(impulse, 1.5, mode="constant", truncate=7 / 1.5)
    kernel -= kernel.mean()

    def filtered(x):
        return ndimage.convolve(np.float64(x), kernel, mode="reflect")

    pairs = [(filtered(x), filtered(y)) for x, y in zip(a, b, strict=True)]
    return [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]


@pytest.mark.parametrize("name", ["unrelated", "noisy copy", "smooth", "almost equal", "mostly background"])
def test_hfen_equals_scipy(name):
    a, b = (np.asarray(x, np.float32) for x in PAIRS[name])
    np.testing.assert_allclose(metrics.hfen(a, b), reference_hfen(a, b), rtol=1e-4)
    np.testing.assert_allclose(metrics.hfen(a[..., None], b[..., None]), metrics.hfen(a, b), rtol=1e-6)


@pytest.mark.parametrize("shape", [(7, 7), (7, 40), (20, 8), (3, 5)])
def test_hfen_mirrors_images_smaller_than_its_kernel(shape):
    a, b = (np.float32(0.5 + noise(seed, 0.1, (2, *shape))) for seed in (0, 1))
    np.testing.assert_allclose(metrics.hfen(a, b), reference_hfen(a, b), rtol=1e-4)


def test_hfen_sees_lost_detail_and_no_constant():
    b = jnp.asarray(PAIRS["unrelated"][1], jnp.float32)
    np.testing.assert_array_equal(metrics.hfen(b, b), 0)
    np.testing.assert_allclose(metrics.hfen(b + 0.25, b), 0, atol=1e-5)
    np.testing.assert_allclose(metrics.hfen(jnp.full_like(b, 0.7), b), 1, rtol=1e-4)  # all detail lost


def test_hfen_is_no_number_where_the_original_is_of_one_value():
    flat = jnp.full((2, 20, 20), 0.9)
    assert np.isnan(metrics.hfen(flat.at[:, 3].set(0), flat)).all()
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        metrics.hfen(flat[0], flat[0])


def test_perceptual_distance_is_the_loss_of_each_image():
    features, target = ({"a": noise(seed, 1, (3, 8, 4, 2)), "b": noise(seed, 1, (3, 4, 2, 6))} for seed in (0, 1))
    target["b"][1] *= 5
    found = metrics.perceptual_distance(features, target)
    for index in range(3):
        one, other = (
            {name: jnp.asarray(x[index : index + 1]) for name, x in each.items()} for each in (features, target)
        )
        np.testing.assert_allclose(found[index], losses.perceptual_loss(one, other), rtol=1e-5)
    assert found[1] > 1.5 * found[0]
