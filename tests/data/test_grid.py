"""Bringing slices to the model's grid and back: no pixel moved, or as scikit-image resizes."""

import numpy as np
import pytest
from skimage.transform import resize

from vqvae_jax.data import grid

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("size", [(32, 16), (40, 16), (32, 11), (21, 25), (33, 17), (7, 8)])
def test_pad_crop_moves_no_pixel_and_is_undone_where_it_did_not_cut(size):
    pixels = RNG.uniform(0.1, 1, (32, 16)).astype(np.float32)
    fitted = grid.fit(pixels, size, "pad-crop")
    assert fitted.shape == size
    kept = np.isin(pixels, fitted)
    assert kept.sum() == np.count_nonzero(fitted) == min(32, size[0]) * min(16, size[1])
    np.testing.assert_array_equal(grid.unfit(fitted, pixels.shape, "pad-crop"), np.where(kept, pixels, 0))
    for inside in (kept, fitted > 0):  # centred, to half a pixel
        for side, positions in zip(inside.shape, np.nonzero(inside), strict=True):
            assert abs(positions.min() - (side - 1 - positions.max())) <= 1


@pytest.mark.parametrize("size", [(64, 32), (16, 8), (16, 40), (31, 17)])
def test_resize_is_skimages_and_is_undone_but_for_detail(size):
    rows, columns = np.mgrid[0:1:32j, 0:1:16j]
    pixels = (0.5 + 0.4 * np.cos(3 * rows) * np.sin(3 * columns)).astype(np.float32)
    fitted = grid.fit(pixels, size, "resize")
    assert fitted.dtype == np.float32
    expected = resize(pixels.astype(np.float64), size, order=1, mode="edge", anti_aliasing=size[0] < 32 or size[1] < 16)
    np.testing.assert_allclose(fitted, expected, atol=1e-6)
    np.testing.assert_allclose(grid.unfit(fitted, pixels.shape, "resize"), pixels, atol=0.06)


def test_shrinking_does_not_alias():
    stripes = np.tile(np.float32([0, 1]), (64, 32))
    np.testing.assert_allclose(grid.fit(stripes, (21, 21), "resize")[:, 3:-3], 0.5, atol=0.1)
