"""Augmented images are what NumPy and SciPy make of the same draw, differ from each other, and stay in [0, 1]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vqvae_jax.config import AugmentationConfig
from vqvae_jax.training import augmentation

KEY = jax.random.key(3)
KINDS = {"flip": True, "rotation": 10.0, "zoom": 0.2, "shift": 0.1, "gamma": 0.3, "bias_field": 0.5}


def augment(key, images, config):
    return augmentation.augment(key, images, config, jnp.arange(len(images)))


def smooth_images(count=6, height=24, width=16):
    noise = np.random.default_rng(0).random((count, height, width))
    return ndimage.gaussian_filter(noise, (0, 2, 2)).astype(np.float32)[..., None]


def test_off_is_the_identity():
    images = smooth_images()
    np.testing.assert_array_equal(augment(KEY, images, AugmentationConfig()), images)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_changed_by_its_own_draw(kind):
    images = np.repeat(smooth_images(1), 8, axis=0)
    changed = np.asarray(jax.jit(lambda key: augment(key, images, AugmentationConfig(**{kind: KINDS[kind]})))(KEY))
    assert changed.shape == images.shape and changed.dtype == np.float32
    assert changed.min() >= 0 and changed.max() <= 1
    assert len(np.unique(changed.reshape(8, -1), axis=0)) == (2 if kind == "flip" else 8)
    again = augment(KEY, images, AugmentationConfig(**{kind: KINDS[kind]}))
    np.testing.assert_allclose(again, changed, atol=1e-6)


def test_flip_mirrors_the_first_axis_of_half_the_images():
    images = smooth_images(400, 6, 4)
    changed = np.asarray(augment(KEY, images, AugmentationConfig(flip=True)))
    mirrored = np.array([np.array_equal(a, b[::-1]) for a, b in zip(changed, images, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(changed, images, strict=True)])
    assert np.all(mirrored ^ kept)
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("fields", [{"rotation": 20.0}, {"zoom": 0.3}, {"shift": 0.2}, {"rotation": 9.0, "zoom": 0.1}])
def test_moves_are_scipys(fields):
    image = smooth_images(1)[0, :, :, 0]
    affine = np.asarray(augmentation._draw_affine(KEY, image.shape, AugmentationConfig(**fields)))
    centre = (np.array(image.shape) - 1) / 2
    offset = affine[:, 2] + centre - affine[:, :2] @ centre
    expected = ndimage.affine_transform(image, affine[:, :2], offset, order=1, mode="nearest")
    found = augmentation._move(jnp.asarray(image), jnp.asarray(affine))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - image).max() > 1e-3


def test_draws_stay_within_their_bounds():
    config = AugmentationConfig(rotation=10.0, zoom=0.2, shift=0.1)
    draws = jax.vmap(lambda key: augmentation._draw_affine(key, (40, 20), config))(jax.random.split(KEY, 500))
    scale = 1 / np.sqrt(np.linalg.det(draws[:, :, :2]))
    angle = np.degrees(np.arctan2(draws[:, 1, 0], draws[:, 0, 0]))
    for values, low, high in (
        (scale, 1 / 1.2, 1.2),
        (angle, -10, 10),
        (draws[:, 0, 2], -4, 4),
        (draws[:, 1, 2], -2, 2),
    ):
        reach = high - low
        assert low <= values.min() < low + 0.05 * reach and high - 0.05 * reach < values.max() <= high


@pytest.mark.slow
def test_parts_of_a_batch_draw_as_the_whole():
    images, config = smooth_images(), AugmentationConfig(**KINDS)
    places = np.array([[0, 2, 4], [1, 3, 5]])
    parts = [augmentation.augment(KEY, images[own], config, own) for own in places]
    np.testing.assert_allclose(np.concatenate(parts), augment(KEY, images, config)[places.ravel()], atol=1e-6)


def test_gamma_keeps_black_white_and_order():
    images = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 4, 3, 1)
    changed = np.ravel(augment(KEY, images, AugmentationConfig(gamma=0.5)))
    assert changed[0] == 0 and changed[-1] == 1 and np.all(np.diff(changed) > 0)
    exponent = np.log(changed[1:-1]) / np.log(np.ravel(images)[1:-1])
    np.testing.assert_allclose(exponent, exponent[0], rtol=1e-4)
    assert np.exp(-0.5) <= exponent[0] <= np.exp(0.5)


def test_a_bias_field_is_smooth_and_bounded():
    fields = [np.asarray(augmentation._bias_field(key, (40, 30), 0.5)) for key in jax.random.split(KEY, 50)]
    assert all(np.exp(-0.5) <= field.min() < field.max() <= np.exp(0.5) for field in fields)
    for field in fields:  # third differences of a polynomial of degree 2 are none
        assert np.abs(np.diff(np.log(field), n=3, axis=0)).max() < 1e-5
