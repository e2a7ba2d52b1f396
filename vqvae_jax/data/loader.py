"""Batches for training and evaluation: Grain shuffles, shards by process, prefetches and can be resumed."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from vqvae_jax.config import DataConfig
from vqvae_jax.data import hip_mri, volumes
from vqvae_jax.data.grid import fit
from vqvae_jax.data.intensity import scale
from vqvae_jax.data.survey import Survey
from vqvae_jax.errors import DataError
from vqvae_jax.runtime import distributed

_READ_SLICES = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
_READ_BATCHES = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)  # 4 MB each of 32 slices of 256 x 128


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One slice as it was acquired, and where it comes from.

    Attributes:
      index: its place in the split.
      intensities: float32 [H, W] on its own grid.
      range: the intensities of its file that become 0 and 1.
      file, case, slice: its origin.
      affine: float64 [4, 4] from (row, column, 0) to mm.
    """

    index: int
    intensities: np.ndarray
    range: tuple[float, float]
    file: str
    case: str
    slice: int
    affine: np.ndarray

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """float32 [H, W] in [0, 1] on its own grid."""
        return scale(self.intensities, *self.range)


class Slices:
    """Random access to the prepared slices of a split: float32 [H, W, 1] in [0, 1] at the model's size.

    Args:
      records: a TFDS data source of ``hip_mri`` records.
      config: how to scale and fit.
      image_size: the model's height and width.

    Slices are prepared when first asked for, and kept where the whole split takes a quarter of the memory or less.
    """

    def __init__(self, records: Any, config: DataConfig, image_size: tuple[int, int]):
        self._records = records
        self._config = config
        self.image_shape = (*image_size, 1)
        needed = len(records) * image_size[0] * image_size[1] * 4
        self._kept: list | None = [None] * len(records) if needed <= _kept_bytes() else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._kept is not None and self._kept[index] is not None:
            return self._kept[index]
        return self.fitted(self.sample(index))

    def sample(self, index: int) -> Sample:
        """One slice as it was acquired."""
        record = self._records[index]
        low, high = (float(value) for value in record["range"])
        return Sample(
            index=int(index),
            intensities=record["image"],
            range=(low, high),
            file=record["file"].decode(),
            case=record["case"].decode(),
            slice=int(record["slice"]),
            affine=record["affine"],
        )

    def fitted(self, sample: Sample) -> np.ndarray:
        """A slice as the model takes it."""
        if self._kept is not None and self._kept[sample.index] is not None:
            return self._kept[sample.index]
        image = fit(sample.pixels, self.image_shape[:2], self._config.fit)[..., None]
        if self._kept is not None:
            self._kept[sample.index] = image
        return image


def open_splits(
    survey: Survey,
    config: DataConfig,
    image_size: tuple[int, int],
    splits: Sequence[str],
    log: Callable[[str], None] = print,
) -> list[Slices]:
    """The slices of some splits; of several processes, the first builds the data set.

    Args:
      survey: the files, as `hip_mri.look` finds them.
      config: how to read them.
      image_size: the model's height and width.
      splits: some of train, validation and test, or of what the survey has.
      log: is given lines for people.

    Raises:
      DataError: a split without images; or files that cannot be read (all are named).
    """
    for split in splits:
        if not survey.slices(split):
            raise DataError(
                f"{survey.path}: has no images of the split {split}; give it some, or give no splits at all"
            )
    with distributed.first_alone():
        builder = hip_mri.build(survey, config, log)
    return [Slices(builder.as_data_source(split=split), config, image_size) for split in splits]


class Clips:
    """Random access to slices, each with those before it in its volume.

    An item is a dict: ``images`` [H, W, 1], ``before`` [neighbours, H, W, 1], the slice before first, and ``present``
    bool [neighbours], which of those there are.
    """

    def __init__(self, slices: Slices, neighbours: int):
        self._slices = slices
        self._before = volumes.around(*volumes.of_slices(slices), [-1 - offset for offset in range(neighbours)])

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        places = self._before[index]
        before = np.stack([self._slices[int(place) if place >= 0 else index] for place in places])
        return {"images": self._slices[index], "before": before, "present": places >= 0}


class TrainLoader:
    """An endless stream of training images [batch_size / parts / processes, H, W, 1], or of `Clips` of them.

    The stream is a function of the seed alone: each epoch is one permutation of the split cut into
    ``batches_per_epoch`` batches (what is left over differs from epoch to epoch). Each batch is cut into ``parts``,
    one step each, which the processes share between them, so that a run resumes with another number of processes.

    Args:
      slices: the training split, as `Slices` or `Clips`.
      batch_size: slices in a batch, over all processes.
      seed: fixes the order.
      parts: steps that a batch is given in.
      process_index, process_count: which share of every step is this process's.

    Raises:
      DataError: fewer slices than one batch, or processes that do not divide a step's slices.
    """

    def __init__(
        self,
        slices: Slices | Clips,
        batch_size: int,
        seed: int,
        *,
        parts: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if len(slices) < batch_size:
            raise DataError(
                f"the training split has {len(slices)} slices, fewer than one batch of {batch_size}; "
                f"use --batch-size {len(slices)} or less"
            )
        if batch_size % (parts * process_count):
            raise DataError(f"--batch-size {batch_size} does not divide over {process_count} processes")
        self.batches_per_epoch = len(slices) // batch_size
        self.steps_per_epoch = self.batches_per_epoch * parts
        whole = self.batches_per_epoch * batch_size
        dataset = grain.MapDataset.source(slices).seed(seed).shuffle()[:whole][process_index::process_count]
        dataset = dataset.batch(batch_size // parts // process_count, drop_remainder=True).repeat()
        self._iterator = iter(dataset.to_iter_dataset(_READ_BATCHES))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Position in the stream, as JSON-able values."""
        return dict(self._iterator.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that ``get_state`` returned; the next batch is the one that followed it."""
        self._iterator.set_state(state)


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatch:
    """``images`` [B, H, W, 1]; ``mask`` float32 [B], 0 where the batch is padded; ``samples`` of what is not padded."""

    images: np.ndarray
    mask: np.ndarray
    samples: list[Sample]


def eval_batches(
    slices: Slices, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[EvalBatch]:
    """All slices once and in order, in batches of ``batch_size``, the last padded with blank images.

    Every process yields the same number of batches, over its own share of the slices. Each record is read once.
    """
    own = range(process_index, len(slices), process_count)
    stream = iter(grain.MapDataset.source(_Prepared(slices))[own.start :: own.step].to_iter_dataset(_READ_SLICES))
    for _ in range(0, -(-len(slices) // process_count), batch_size):
        yield batch_of([next(stream) for _ in own[:batch_size]], batch_size, slices.image_shape)
        own = own[batch_size:]


def batch_of(prepared: Sequence[tuple[Sample, np.ndarray]], batch_size: int, shape: tuple[int, ...]) -> EvalBatch:
    """At most ``batch_size`` slices, each with the image of this shape that the model takes, as one batch."""
    images = np.zeros((batch_size, *shape), np.float32)
    for row, (_, image) in enumerate(prepared):
        images[row] = image
    mask = (np.arange(batch_size) < len(prepared)).astype(np.float32)
    return EvalBatch(images, mask, [sample for sample, _ in prepared])


def _kept_bytes() -> int:
    """A quarter of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


class _Prepared:
    """Slices as Grain's threads prepare them for evaluation."""

    def __init__(self, slices: Slices):
        self._slices = slices

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        sample = self._slices.sample(index)
        return sample, self._slices.fitted(sample)
