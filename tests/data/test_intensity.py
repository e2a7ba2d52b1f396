"""Scaling of intensities to [0, 1] by percentiles, and back."""

import numpy as np
import pytest

from vqvae_jax.data import intensity

RNG = np.random.default_rng(0)


def test_scale_maps_the_percentiles_to_0_and_1_and_unscale_undoes_it():
    pixels = RNG.normal(300, 90, (64, 32)).astype(np.float32)
    low, high = intensity.intensity_range(pixels, (2, 95))
    assert np.mean(pixels < low) == pytest.approx(0.02, abs=0.002)
    assert np.mean(pixels > high) == pytest.approx(0.05, abs=0.002)
    scaled = intensity.scale(pixels, low, high)
    assert scaled.dtype == np.float32
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_allclose(intensity.unscale(scaled, low, high), pixels.clip(low, high), rtol=1e-5)


@pytest.mark.parametrize("value", [0, -7, 1e38])
def test_a_constant_image_scales_to_zeros_and_back(value):
    pixels = np.full((9, 8), value, np.float32)
    with np.errstate(all="raise"):
        low, high = intensity.intensity_range(pixels, (0.5, 99.5))
        scaled = intensity.scale(pixels, low, high)
    assert (scaled == 0).all()
    np.testing.assert_array_equal(intensity.unscale(scaled, low, high), pixels)


@pytest.mark.parametrize("pair", [(0, 1), (1, np.nextafter(np.float32(1), 2)), (-1e38, 1e38), (0, 1e-38)])
@pytest.mark.parametrize("bright", [1, 10, 63])
def test_two_intensities_however_few_or_close_stay_apart(pair, bright):
    pixels = np.full(64 * 32, pair[0], np.float32).reshape(64, 32)
    pixels[:bright, 0] = pair[1]
    with np.errstate(all="raise", under="ignore"):  # 99.52 lies between the last dark and 10 bright pixels
        limits = intensity.intensity_range(pixels, (0.48, 99.52))
        scaled = intensity.scale(pixels, *np.array(limits, np.float32))
    np.testing.assert_array_equal(np.unique(scaled), [0, 1])
