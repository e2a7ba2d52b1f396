"""Batches for training and evaluation: Grain shuffles, shards by process, prefetches and can be resumed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from vqvae_jax.config import DataConfig
from vqvae_jax.data import nifti
from vqvae_jax.errors import DataError

_READ_SLICES = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
_READ_BATCHES = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # 4 MB each of 32 slices of 256 x 128


@dataclasses.dataclass(frozen=True)
class Sample:
    """One slice on its own grid: ``pixels`` float32 [H, W] in [0, 1], and where it comes from."""

    pixels: np.ndarray
    file: str
    case: str
    slice: int
    range: tuple[float, float]
    affine: np.ndarray


class Slices:
    """Random access to the prepared slices of a split: float32 [H, W, 1] in [0, 1] at the model's size.

    Args:
      records: a TFDS data source of ``hip_mri`` records.
      config: how to scale and fit.
      image_size: the model's height and width.

    Slices are prepared when first asked for, and kept where the whole split fits in the memory limit.
    """

    def __init__(self, records: Any, config: DataConfig, image_size: tuple[int, int]):
        self._records = records
        self._config = config
        self.image_shape = (*image_size, 1)
        needed = len(records) * image_size[0] * image_size[1] * 4
        self._kept: list | None = [None] * len(records) if needed <= config.memory_limit_gib * 2**30 else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._kept is not None and self._kept[index] is not None:
            return self._kept[index]
        record = self._records[index]
        pixels = nifti.scale(record["image"], *record["range"])
        fitted = nifti.fit(pixels, self.image_shape[:2], self._config.fit)[..., None]
        if self._kept is not None:
            self._kept[index] = fitted
        return fitted

    def intensities(self, index: int) -> np.ndarray:
        """One slice as acquired: float32 [H, W] on its own grid."""
        return self._records[index]["image"]

    def sample(self, index: int) -> Sample:
        """One slice on its own grid, with its origin."""
        record = self._records[index]
        low, high = (float(value) for value in record["range"])
        return Sample(
            pixels=nifti.scale(record["image"], low, high),
            file=record["file"].decode(),
            case=record["case"].decode(),
            slice=int(record["slice"]),
            range=(low, high),
            affine=record["affine"],
        )


class TrainLoader:
    """An endless stream of training batches [batch_size / processes, H, W, 1].

    The stream is a function of the seed alone: each epoch is one permutation of the split cut into
    ``steps_per_epoch`` batches (what is left over differs from epoch to epoch), and the processes share
    each batch between them, so that a run resumes with another number of processes.

    Args:
      slices: the training split.
      batch_size: slices in a step, over all processes.
      seed: fixes the order.
      process_index, process_count: which part of every batch is this process's.

    Raises:
      DataError: fewer slices than one batch, or processes that do not divide the batch.
    """

    def __init__(self, slices: Slices, batch_size: int, seed: int, *, process_index: int = 0, process_count: int = 1):
        if len(slices) < batch_size:
            raise DataError(
                f"the training split has {len(slices)} slices, fewer than one batch of {batch_size}; "
                f"use --batch-size {len(slices)} or less"
            )
        if batch_size % process_count:
            raise DataError(f"--batch-size {batch_size} does not divide over {process_count} processes")
        self.steps_per_epoch = len(slices) // batch_size
        whole = self.steps_per_epoch * batch_size
        dataset = grain.MapDataset.source(slices).seed(seed).shuffle()[:whole][process_index::process_count]
        dataset = dataset.batch(batch_size // process_count, drop_remainder=True).repeat()
        self._iterator = iter(dataset.to_iter_dataset(_READ_BATCHES))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Position in the stream, as JSON-able values."""
        return dict(self._iterator.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that ``get_state`` returned; the next batch is the one that followed it."""
        self._iterator.set_state(state)


@dataclasses.dataclass(frozen=True)
class EvalBatch:
    """``images`` [B, H, W, 1]; ``mask`` float32 [B], 0 where the last batch is padded; ``indices`` [B]."""

    images: np.ndarray
    mask: np.ndarray
    indices: np.ndarray


def eval_batches(
    slices: Slices, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[EvalBatch]:
    """All slices once and in order, in batches of ``batch_size``, the last padded with blank images.

    Every process yields the same number of batches, over its own share of the slices.
    """
    own = range(process_index, len(slices), process_count)
    rows = -(-len(slices) // process_count)
    stream = iter(grain.MapDataset.source(slices)[own.start :: own.step].to_iter_dataset(_READ_SLICES))
    for start in range(0, rows, batch_size):
        indices = np.zeros(batch_size, np.int32)
        mask = np.zeros(batch_size, np.float32)
        images = np.zeros((batch_size, *slices.image_shape), np.float32)
        for row, index in enumerate(own[start : start + batch_size]):
            indices[row], mask[row], images[row] = index, 1, next(stream)
        yield EvalBatch(images, mask, indices)
