"""SSIM equals scikit-image's, MS-SSIM its formula, both in float64; their gradients equal finite differences."""

import gzip
import zipfile

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from conftest import REAL_DATA
from image_pairs import PAIRS, SHAPE, noise, smooth
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.measure import block_reduce
from skimage.metrics import structural_similarity

from vqvae_jax.metrics import similarity

SLICES = REAL_DATA / "prostatex" / "prostatex_keras_slices_data.zip"


def reference_ssim(a, b, data_range=1.0):
    pairs = zip(np.asarray(a, np.float64), np.asarray(b, np.float64), strict=True)
    return np.array([structural_similarity(x, y, data_range=data_range) for x, y in pairs])


def halved(x):
    return block_reduce(x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2], (2, 2), np.mean)


def reference_ms_ssim(a, b, scales, data_range=1.0):
    """The formula in float64, for a given number of scales."""
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    results = []
    for x, y in zip(np.asarray(a, np.float64), np.asarray(b, np.float64), strict=True):
        result, one, other = 1.0, x, y
        for scale, weight in enumerate(weights / weights.sum()):
            mean_x, mean_y, xx, yy, xy = (
                uniform_filter(z, 7)[3:-3, 3:-3] for z in (one, other, one**2, other**2, one * other)
            )
            var_x, var_y, cov = (49 / 48 * z for z in (xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y))
            factor = (2 * cov + (0.03 * data_range) ** 2) / (var_x + var_y + (0.03 * data_range) ** 2)
            if scale == scales - 1:
                c1 = (0.01 * data_range) ** 2
                factor *= (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            result *= max(factor.mean(), 0) ** weight
            one, other = (halved(z) for z in (one, other))
        results.append(result)
    return np.array(results)


@pytest.mark.parametrize("name", PAIRS)
def test_ssim_equals_scikit_image(name):
    a, b = (np.asarray(x, np.float32) for x in PAIRS[name])
    np.testing.assert_allclose(similarity.ssim(a, b), reference_ssim(a, b), rtol=0, atol=1e-5)


@pytest.mark.parametrize("data_range", [0.01, 255.0, 4095.0])
def test_ssim_of_other_ranges(data_range):
    a, b = (np.asarray(data_range * x, np.float32) for x in PAIRS["noisy copy"])
    expected = reference_ssim(a, b, data_range)
    np.testing.assert_allclose(similarity.ssim(a, b, data_range=data_range), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 7), (7, 20), (20, 7), (33, 8)])
def test_ssim_at_the_smallest_sizes(shape):
    a, b = (np.float32(0.5 + noise(seed, 0.1, (2, *shape))) for seed in (0, 1))
    np.testing.assert_allclose(similarity.ssim(a, b), reference_ssim(a, b), rtol=0, atol=1e-5)


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
        np.testing.assert_allclose(similarity.ssim(a, b), reference_ssim(a, b), rtol=0, atol=1e-5)


def test_ssim_takes_a_channel_axis_and_is_symmetric():
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS["noisy copy"])
    np.testing.assert_array_equal(similarity.ssim(a[..., None], b[..., None]), similarity.ssim(a, b))
    np.testing.assert_allclose(similarity.ssim(b, a), similarity.ssim(a, b), rtol=1e-6)


def test_ssim_has_finite_gradients_where_images_are_flat():
    flat = jnp.zeros((1, *SHAPE))
    gradient = jax.grad(lambda a: similarity.ssim(a, flat).sum())(flat)
    assert np.isfinite(gradient).all()


def test_a_gradient_step_raises_ssim():
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS["unrelated"])
    gradient = jax.grad(lambda x: similarity.ssim(x, b).sum())(a)
    assert (similarity.ssim(a + gradient / jnp.abs(gradient).max() * 0.01, b) > similarity.ssim(a, b)).all()


def test_ssim_refuses_what_it_cannot_compare():
    image = jnp.zeros((2, 16, 16))
    with pytest.raises(ValueError, match=r"at least 7 x 7 pixels .* got 6 x 16"):
        similarity.ssim(image[:, :6], image[:, :6])
    with pytest.raises(ValueError, match=r"at least 7 x 7 pixels .* got 16 x 6"):
        similarity.ssim(image[:, :, :6], image[:, :, :6])
    with pytest.raises(ValueError, match="one shape"):
        similarity.ssim(image, image[:1])
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        similarity.ssim(image[0], image[0])
    with pytest.raises(ValueError, match=r"\[N, H, W, 1\]"):
        similarity.ssim(jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 16, 16, 3)))


REFERENCES = {
    "ssim": (similarity.ssim, reference_ssim),
    "ms_ssim": (similarity.ms_ssim, lambda a, b: reference_ms_ssim(a, b, scales=3)),
}


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize(
    ("name", "pair"),
    [
        *(("ssim", pair) for pair in ("unrelated", "noisy copy", "smooth", "mostly background", "ramp and its shift")),
        *(
            pytest.param("ms_ssim", pair, marks=pytest.mark.slow)
            for pair in ("noisy copy", "mostly background", "ramp and its shift")
        ),
    ],
)
def test_gradients_equal_finite_differences_in_float64(name, pair, argument):
    """Along a random direction and along one that changes few pixels, where MS-SSIM is not 0."""
    ours, reference = REFERENCES[name]
    pair = [np.asarray(x, np.float32) for x in PAIRS[pair]]
    gradient = np.asarray(jax.grad(lambda *pair: ours(*pair).sum(), argument)(*map(jnp.asarray, pair)), np.float64)
    corner = np.zeros((3, *SHAPE))
    corner[:, :3, :5] = 1
    for direction in (noise(7), corner):
        step = 1e-6
        ends = [[np.float64(x) for x in pair] for _ in range(2)]
        for end, sign in zip(ends, (1, -1), strict=True):
            end[argument] = end[argument] + sign * step * direction
        expected = (reference(*ends[0]) - reference(*ends[1])) / (2 * step)
        found = (gradient * direction).sum(axis=(1, 2))
        scale = np.linalg.norm(gradient, axis=(1, 2)) * np.linalg.norm(direction, axis=(1, 2))
        assert (np.abs(expected) > 1e-5 * scale).all()  # or there would be nothing to compare
        np.testing.assert_array_less(np.abs(found - expected), 1e-4 * scale + 1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_ms_ssim_equals_its_formula(name):
    a, b = (np.asarray(x, np.float32) for x in PAIRS[name])
    np.testing.assert_allclose(similarity.ms_ssim(a, b), reference_ms_ssim(a, b, scales=3), rtol=0, atol=2e-5)


BIG = [pytest.param(*case, marks=pytest.mark.slow) for case in (((112, 120), 5), ((111, 200), 4), ((128, 64), 4))]


@pytest.mark.parametrize(
    ("shape", "scales"),
    [*BIG, ((33, 29), 3), ((14, 27), 2), ((13, 40), 1), ((7, 7), 1)],
)
def test_ms_ssim_takes_the_scales_that_fit(shape, scales):
    a = np.float32(0.5 + gaussian_filter(noise(0, 1, (2, *shape)), (0, 3, 3)))
    b = np.float32(a + noise(1, 0.05, (2, *shape)))
    expected = reference_ms_ssim(a, b, scales)
    assert (expected < 0.99).all() and (expected > 0.2).all()
    np.testing.assert_allclose(similarity.ms_ssim(a, b), expected, rtol=0, atol=1e-5)
    if scales == 1:
        np.testing.assert_allclose(similarity.ms_ssim(a, b), similarity.ssim(a, b), rtol=1e-6)


def test_ms_ssim_of_other_ranges():
    a, b = (np.asarray(255 * x, np.float32) for x in PAIRS["noisy copy"])
    expected = reference_ms_ssim(a, b, 3, 255.0)
    np.testing.assert_allclose(similarity.ms_ssim(a, b, data_range=255.0), expected, rtol=0, atol=1e-5)


def test_noise_costs_less_at_coarse_scales():
    """What the scales are for: fine noise that ruins SSIM leaves more of MS-SSIM."""
    image = np.float32(smooth(0))
    noisy = np.float32(image + noise(1, 0.1))
    assert (similarity.ms_ssim(noisy, image) > similarity.ssim(noisy, image) + 0.1).all()


@pytest.mark.parametrize("name", ["ssim", pytest.param("ms_ssim", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", ["flat", "flat and equal", "zero", "inverted", "background against zero"])
def test_gradients_are_finite_where_nothing_is_left(pair, name):
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS[pair])
    for argument in (0, 1):
        gradient = jax.grad(lambda *pair: getattr(similarity, name)(*pair).sum(), argument)(a, b)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
def test_identical_images_are_a_maximum(name):
    a = jnp.asarray(PAIRS["unrelated"][0], jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: getattr(similarity, name)(x, a).mean())(a)
    np.testing.assert_allclose(value, 1, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert (getattr(similarity, name)(a + 0.1 * PAIRS["unrelated"][1], a) < 0.999).all()


def test_a_negative_factor_makes_ms_ssim_0():
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS["inverted"])
    assert (similarity.ssim(a, b) < 0).all()
    np.testing.assert_array_equal(similarity.ms_ssim(a, b), 0)


def test_images_are_compared_one_by_one():
    a, b = (jnp.asarray(x, jnp.float32) for x in PAIRS["noisy copy"])
    np.testing.assert_array_equal(np.isnan(similarity.ms_ssim(a, b.at[1].set(jnp.nan))), [False, True, False])
    with pytest.raises(ValueError, match=r"ms_ssim needs .* at least 7 x 7 pixels .* got 6 x 48"):
        similarity.ms_ssim(a[:, :6], b[:, :6])
