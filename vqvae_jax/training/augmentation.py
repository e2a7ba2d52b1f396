"""Random changes to training images that another scan of the same body could have shown; pure, jitted with the step."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from vqvae_jax.config import AugmentationConfig

BIAS_DEGREE = 2
"""Degree, along each axis, of the polynomial whose exponential is the bias field: smooth over the whole image."""


def augment(key: jax.Array, images: jax.Array, config: AugmentationConfig, places: jax.Array) -> jax.Array:
    """Each image changed by its own draw: mirrored, moved, then its intensities.

    Args:
      key: a random key; the same gives the same changes.
      images: [N, H, W, 1] in [0, 1].
      config: how much of each; what is 0 costs nothing.
      places: int32 [N], each image's place in the whole batch: its draw does not depend on who makes it.

    Returns:
      [N, H, W, 1] in [0, 1].
    """

    def change(key: jax.Array, image: jax.Array) -> jax.Array:
        mirror_key, move_key, gamma_key, bias_key = jax.random.split(key, 4)
        if config.flip:
            image = jnp.where(jax.random.bernoulli(mirror_key), image[::-1], image)
        if config.rotation or config.zoom or config.shift:
            image = _move(image, _draw_affine(move_key, image.shape, config))
        if config.gamma:
            image = image ** jnp.exp(_uniform(gamma_key, (), config.gamma))
        if config.bias_field:
            image = jnp.clip(image * _bias_field(bias_key, image.shape, config.bias_field), 0, 1)
        return image

    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
    return jax.vmap(change)(keys, images[..., 0])[..., None]


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _draw_affine(key: jax.Array, shape: tuple[int, int], config: AugmentationConfig) -> jax.Array:
    """[2, 3]: for a pixel's place from the centre, the place it is taken from."""
    angle_key, zoom_key, shift_key = jax.random.split(key, 3)
    angle = jnp.deg2rad(_uniform(angle_key, (), config.rotation))
    zoom = jnp.exp(_uniform(zoom_key, (), jnp.log1p(config.zoom)))
    shift = _uniform(shift_key, (2,), config.shift) * jnp.asarray(shape)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    return jnp.concatenate([rotation / zoom, shift[:, None]], axis=1)


def _move(image: jax.Array, affine: jax.Array) -> jax.Array:
    """The image [H, W] taken bilinearly from the places of ``affine``; beyond the border, the border's value."""
    centre = (jnp.asarray(image.shape) - 1) / 2
    places = jnp.stack(jnp.meshgrid(*(jnp.arange(side) for side in image.shape), indexing="ij"), axis=-1) - centre
    sources = places @ affine[:, :2].T + affine[:, 2] + centre
    return map_coordinates(image, list(jnp.moveaxis(sources, -1, 0)), order=1, mode="nearest")


def _bias_field(key: jax.Array, shape: tuple[int, int], strength: float) -> jax.Array:
    """exp of a random polynomial within +-strength, as a coil's uneven sensitivity (Tustison et al. 2010, N4ITK)."""
    coefficients = _uniform(key, (BIAS_DEGREE + 1, BIAS_DEGREE + 1), strength / (BIAS_DEGREE + 1) ** 2)
    rows, columns = (jnp.linspace(-1, 1, side)[:, None] ** jnp.arange(BIAS_DEGREE + 1) for side in shape)
    return jnp.exp(rows @ coefficients @ columns.T)
