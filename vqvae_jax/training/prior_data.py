"""What a prior is trained on: the codes of a split's slices, drawn anew for each epoch from augmented slices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.config import Config
from vqvae_jax.data import volumes
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime import distributed
from vqvae_jax.runtime.randomness import Purpose, key_for
from vqvae_jax.training.augmentation import augment
from vqvae_jax.training.prior_step import Grids
from vqvae_jax.training.state import Variables
from vqvae_jax.training.step import pmapped, split_over_devices

ENCODED_AT_ONCE = 16
"""Slices that each device encodes at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """Codes int32 [N, h, w] of a split's slices; ``before`` int [N, neighbours] are the places of those before each.

    -1 where there is none.
    """

    indices: np.ndarray
    before: np.ndarray

    def grids(self, chosen: np.ndarray) -> Grids:
        """Some slices [n], each with the slices before it."""
        before = self.before[chosen]
        return Grids(self.indices[chosen], self.indices[np.maximum(before, 0)], before >= 0)


class CodeSource:
    """Encodes a split's slices with a run's frozen encoder.

    The slices of a volume are changed alike, so that the slice before stays the slice before. Each volume is mirrored
    or not along its first axis, moved by whole pixels up to one code's width, and changed as the run's own
    augmentation says. Half of the volumes go backwards.

    Args:
      config: the run's configuration.
      variables: its model's, on every device.
      slices: the split (`loader.Slices`).
      neighbours: how many slices before each are kept with it.
      seed: of the augmentation.
    """

    def __init__(self, config: Config, variables: Variables, slices: Any, neighbours: int, seed: int):
        self._variables = variables
        self._slices = slices
        self._seed = seed
        self._volume, self._numbers = volumes.of_slices(slices)
        offsets = range(1, neighbours + 1)
        self._before = volumes.around(self._volume, self._numbers, [-offset for offset in offsets])
        self._after = volumes.around(self._volume, self._numbers, offsets)
        model, augmentation = VQVAE(config.model), dataclasses.replace(config.augmentation, flip=True)

        def encode(variables, images):
            return model.apply(variables, images, method="to_indices")

        def encode_augmented(variables, images, volume, epoch):
            _, changing, shifting = self._keys(epoch)
            images = augment(changing, images, augmentation, volume)
            keys = jax.vmap(lambda number: jax.random.fold_in(shifting, number))(volume)
            images = jax.vmap(lambda key, image: shifted(key, image, config.model.downsampling))(keys, images)
            return encode(variables, images)

        self._encode = pmapped(encode, (None, 0), 0)
        self._encode_augmented = pmapped(encode_augmented, (None, 0, 0, None), 0)

    def __len__(self) -> int:
        return len(self._slices)

    def volumes(self) -> Iterator[np.ndarray]:
        """The places in the split of each volume's slices, in the order of their numbers."""
        for number in range(int(self._volume.max()) + 1):
            places = np.flatnonzero(self._volume == number)
            yield places[np.argsort([self._numbers[place] for place in places], kind="stable")]

    def plain(self) -> Codes:
        """Codes of the slices as they are."""
        return Codes(self._all(lambda images, volume: self._encode(self._variables, images)), self._before)

    def augmented(self, epoch: int) -> Codes:
        """Codes of the slices as an epoch shows them; a function of seed and epoch."""
        directions, *_ = self._keys(epoch)
        backwards = np.asarray(jax.random.bernoulli(directions, shape=(int(self._volume.max()) + 1,)))[self._volume]
        before = np.where(backwards[:, None], self._after, self._before)
        number = np.int32(epoch)
        return Codes(
            self._all(lambda *given: self._encode_augmented(self._variables, *given, number)),
            before,
        )

    def _keys(self, epoch: Any) -> jax.Array:
        return jax.random.split(key_for(self._seed, Purpose.PRIOR_AUGMENTATION, epoch), 3)

    def _all(self, encode: Callable[[np.ndarray, np.ndarray], jax.Array]) -> np.ndarray:
        """Codes of all slices; of several processes, each encodes its share."""
        own = np.arange(jax.process_index(), len(self), jax.process_count())
        at_once = ENCODED_AT_ONCE * jax.local_device_count()
        found = {}
        for start in range(0, len(own), at_once):
            chosen = own[start : start + at_once]
            padded = np.resize(chosen, at_once)
            images = np.stack([self._slices[int(place)] for place in padded])
            indices = np.asarray(encode(split_over_devices(images), split_over_devices(self._volume[padded])))
            grids = indices.reshape(at_once, *indices.shape[2:])
            found |= {int(place): grid for place, grid in zip(chosen, grids, strict=False)}
        found = distributed.gathered(found)
        return np.stack([found[place] for place in range(len(self))])


def shifted(key: jax.Array, image: jax.Array, most: int) -> jax.Array:
    """An image [H, W, 1] moved by whole pixels, up to ``most`` either way; beyond the border, the border's value."""
    padded = jnp.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
    top, left = jax.random.randint(key, (2,), 0, 2 * most + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
