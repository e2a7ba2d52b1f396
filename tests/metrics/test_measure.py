"""All metrics of images of many sizes at once: the values of each function alone, by a handful of programs."""

import numpy as np
import pytest
from image_pairs import PAIRS, noise
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqvae_jax import metrics
from vqvae_jax.metrics.measure import NAMES, _measure

SIZES = [
    (7, 7),
    (7, 40),
    (13, 8),
    (27, 29),
    (64, 48),
    (113, 111),
    (127, 129),
    (128, 128),
    (129, 64),
    (200, 7),
    (199, 200),
]
ALONE = (0, 1, 3, 7)
"""Of the sizes, those that each function is compiled for."""


def pair(size, seed):
    """A reconstruction and its original."""
    original = gaussian_filter(np.random.default_rng(seed).random(size), 1.5)
    original = (original - original.min()) / np.ptp(original)
    return np.float32(original + noise(seed, 0.05, size)), np.float32(original)


@pytest.fixture(scope="module")
def measured():
    images, originals = zip(*[pair(size, seed) for seed, size in enumerate(SIZES)], strict=True)
    return images, originals, metrics.measure(list(images), list(originals))


@pytest.mark.slow
def test_every_metric_is_that_of_its_own_function(measured):
    images, originals, found = measured
    assert list(found) == list(NAMES) == ["ssim", "psnr", "mae", "ms_ssim", "hfen"]
    for name, values in found.items():
        assert isinstance(values, np.ndarray) and values.dtype == np.float32
        for index in ALONE:
            (alone,) = getattr(metrics, name)(images[index][None], originals[index][None])
            np.testing.assert_allclose(values[index], alone, rtol=2e-5, atol=2e-6, err_msg=f"{name} {SIZES[index]}")


def test_ssim_psnr_and_mae_are_those_of_scikit_image_and_numpy(measured):
    images, originals, found = measured
    for index in range(len(SIZES)):
        a, b = np.float64(images[index]), np.float64(originals[index])
        assert found["ssim"][index] == pytest.approx(structural_similarity(a, b, data_range=1), abs=1e-5)
        assert found["psnr"][index] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), rel=1e-5)
        assert found["mae"][index] == pytest.approx(np.abs(a - b).mean(), rel=1e-5)


def test_one_size_is_measured_as_a_batch():
    a, b = (np.asarray(x, np.float32) for x in PAIRS["noisy copy"])
    found = metrics.measure(list(a), list(b))
    for name, values in found.items():
        np.testing.assert_allclose(values, getattr(metrics, name)(a, b), rtol=2e-5, err_msg=name)
    assert np.any(metrics.measure(list(b), list(a))["hfen"] != found["hfen"])  # which is the original counts


def test_limits_are_kept_where_nothing_is_left():
    flat = np.full((20, 9), 0.9, np.float32)
    spoilt = flat.copy()
    spoilt[3] = 0
    found = metrics.measure([flat, spoilt, spoilt], [flat, flat, spoilt])
    np.testing.assert_allclose(found["ssim"][[0, 2]], 1, rtol=1e-6)
    np.testing.assert_allclose(found["ms_ssim"][[0, 2]], 1, rtol=1e-6)
    np.testing.assert_array_equal(found["mae"][[0, 2]], 0)
    assert np.isposinf(found["psnr"][[0, 2]]).all()
    np.testing.assert_array_equal(np.isnan(found["hfen"]), [True, True, False])


def test_each_image_is_measured_alone():
    images, originals = zip(*[pair(size, 3) for size in ((9, 30), (30, 9), (20, 20))], strict=True)
    before = metrics.measure(list(images), list(originals))
    images[1][:] = np.nan
    after = metrics.measure(list(images), list(originals))
    for name in NAMES:
        np.testing.assert_array_equal(after[name][[0, 2]], before[name][[0, 2]])
        assert np.isnan(after[name][1])


def test_no_images_have_no_metrics():
    assert {name: len(values) for name, values in metrics.measure([], []).items()} == dict.fromkeys(NAMES, 0)


def test_24_sizes_need_a_handful_of_programs():
    pairs = [pair((100 + 6 * step, 60 + 5 * step), step) for step in range(24)]
    _measure.clear_cache()
    metrics.measure([a for a, _ in pairs], [b for _, b in pairs])
    assert 1 <= _measure._cache_size() <= 6
