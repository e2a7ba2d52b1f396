"""The TFDS builder ``hip_mri``: NIfTI files in, an ArrayRecord data set out, without TensorFlow."""

import contextlib
import fcntl
import hashlib
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from vqvae_jax.config import DataConfig
from vqvae_jax.data import intensity, nifti, phantom
from vqvae_jax.data.roles import IMAGE
from vqvae_jax.data.splits import SPLITS, WHOLE, week_and_slice
from vqvae_jax.data.survey import Image, Survey, find_data
from vqvae_jax.errors import DataError

PHANTOM = "phantom"
_LISTED = 200
_READERS = 2
_USED = ".used"
"""File of a built data set: its time is that of the last use, and whoever uses it holds a lock on it."""
_in_use: list[int] = []
"""Descriptors of such files, open to the end of this process."""


class HipMri(tfds.core.GeneratorBasedBuilder):
    """MRI slices: raw float32 intensities at their native shape, with geometry and origin.

    Features of a record: ``image`` float32 [H, W]; ``affine`` float64 [4, 4] from (row, column, 0) to mm;
    ``range`` float32 [2], the intensities of the file that become 0 and 1; ``file``, ``case`` text;
    ``week``, ``slice`` int32 (HipMRI's own numbers; in other sets week is -1 and slice the position).

    The folder's name holds a key over the files (names, contents) and the settings that shape the records, so that
    a changed data set is built anew, and a copied one is not.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012
    name = "hip_mri"

    def __init__(self, survey: Survey, config: DataConfig, **kwargs: Any):
        self._survey = survey
        self._config = config
        self.unreadable = [f"{name} {reason}" for name, reason in survey.unreadable]
        self.constant: list[str] = []
        super().__init__(config=build_key(survey, config), file_format="array_record", **kwargs)

    @classmethod
    def _create_builder_config(cls, builder_config: Any, version: Any = None) -> tfds.core.BuilderConfig:
        return tfds.core.BuilderConfig(name=builder_config, version=cls.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        raw = tfds.features.Encoding.BYTES
        return tfds.core.DatasetInfo(
            builder=self,
            description="MRI slices read from NIfTI files.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding=raw),
                    "affine": tfds.features.Tensor(shape=(4, 4), dtype=np.float64, encoding=raw),
                    "range": tfds.features.Tensor(shape=(2,), dtype=np.float32),
                    "file": tfds.features.Text(),
                    "case": tfds.features.Text(),
                    "week": np.int32,
                    "slice": np.int32,
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._splits()}

    def _splits(self) -> list[str]:
        there = {image.split for image in self._survey.images}
        return [split for split in (*SPLITS, WHOLE) if split in there]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        images = [image for image in self._survey.images if image.split == split]
        number = itertools.count()
        for image, (cut, limits, problem) in zip(images, _ahead(self._read, images), strict=True):
            self._bar.update()
            if problem:
                self.unreadable.append(problem)
                continue
            if limits[0] == limits[1]:
                self.constant.append(image.name)
            week, index = week_and_slice(image.name)
            for position, piece in enumerate(cut):
                yield (
                    next(number),
                    {
                        "image": piece.pixels,
                        "affine": piece.affine,
                        "range": np.array(limits, np.float32),
                        "file": image.name,
                        "case": image.case,
                        "week": week,
                        "slice": index if index >= 0 else position,
                    },
                )
        if next(number) == 0:
            self._refuse_empty(split)

    def _read(self, image: Image) -> tuple[list[nifti.Slice], tuple[float, float], str]:
        try:
            volume = self._survey.read(image)
            limits = intensity.intensity_range(volume.voxels, self._config.scale_percentiles)
            try:
                return nifti.slices(volume, -1 if image.cut.axis is None else image.cut.axis), limits, ""
            except DataError as error:
                raise DataError(f"{image.name} {error}") from error
        except DataError as error:
            return [], (0.0, 0.0), str(error)

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        with tqdm.tqdm(total=len(self._survey.images), desc="Reading NIfTI files", unit="file") as self._bar:
            super()._download_and_prepare(*args, **kwargs)
        if self.unreadable and self._config.on_bad_file == "error":
            raise DataError(f"{self._unusable()}. Mend or remove them, or leave them out with --on-bad-file skip")
        self.info.metadata.update(unreadable=self.unreadable, constant=self.constant)

    def _refuse_empty(self, split: str) -> None:
        """Stops a build that TFDS would fail anyway; reads the splits after it, to name their bad files too."""
        later = self._splits()[self._splits().index(split) + 1 :]
        images = [image for image in self._survey.images if image.split in later]
        self.unreadable += [problem for *_, problem in _ahead(self._read, images) if problem]
        raise DataError(f"{self._unusable()}. Mend or replace them: split {split} holds no readable file")

    def _unusable(self) -> str:
        return _unusable(self._survey, self.unreadable)


def _ahead(function: Callable, items: list) -> Iterator:
    """``map`` in order on a few threads, at most a few results ahead (unzipping leaves Python's lock)."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * _READERS:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _listed(lines: list[str]) -> str:
    more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return "; ".join(lines[:_LISTED]) + more


def _unusable(survey: Survey, problems: list[str]) -> str:
    count = f"{len(problems)} of {len(survey.images) + len(survey.unreadable)} files cannot be used"
    return f"{survey.path}: {count}: {_listed(problems)}"


def build_key(survey: Survey, config: DataConfig) -> str:
    """Name of the built data set's folder: 16 hexadecimal digits over the images and the settings."""
    settings = (config.scale_percentiles, config.on_bad_file, config.nan, str(HipMri.VERSION), survey.fingerprint())
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def name_of(config: DataConfig) -> str:
    """The name of the data set's zip, folder or table, or "phantom". Raises DataError where there is none."""
    return PHANTOM if config.data == PHANTOM else find_data(config.data).name


def look(config: DataConfig, image_size: tuple[int, int], *, divide: bool = True) -> Survey:
    """Finds the files of a data set, by their names and headers; data "phantom" writes the phantom first.

    Args:
      config: where the files are and how to read them.
      image_size: height and width of the model's images, and of phantom slices.
      divide: give every image a split; else all are of the split "all".

    Raises:
      DataError: no data; or files whose headers cannot be used (all are named), unless they are to be skipped.
    """
    path = write_phantom(config, image_size) if config.data == PHANTOM else find_data(config.data)
    survey = Survey(path, config, divide=divide)
    problems = _unusable(survey, [f"{name} {reason}" for name, reason in survey.unreadable])
    there = {image.split for image in survey.images}
    for row in survey.rows:
        if row.role == IMAGE and row.split not in there:
            raise DataError(f"{problems}. Mend or replace them: split {row.split} holds no readable file")
    if survey.unreadable and config.on_bad_file == "error":
        raise DataError(f"{problems}. Mend or remove them, or leave them out with --on-bad-file skip")
    survey.check_fit(image_size)
    return survey


def build(survey: Survey, config: DataConfig, log: Callable[[str], None] = print) -> HipMri:
    """Builds the data set of the files found, or opens it where it was built before.

    Raises:
      DataError: files that cannot be read (all are named).
    """
    tfds.disable_progress_bar()
    try:
        builder = HipMri(survey, config, data_dir=config.tfds_dir)
        built = Path(builder.data_path)
        with _one_builder_at_a_time(built.parents[1]):
            if not built.exists():
                _build(builder)
                log(f"Built the data set in {built}")
            _use(built)
            for name in _remove_old(built.parents[1], config.cache_limit * 2**30):
                log(f"Removed the data set {name}, not used for the longest time (--cache-limit)")
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to ArrayRecord
        raise DataError(
            f"--tfds-dir {config.tfds_dir}: cannot be written ({error}); free space or choose another"
        ) from error
    builder = HipMri(survey, config, data_dir=config.tfds_dir)
    for kind, advice in (("unreadable", "left out"), ("constant", "kept: every pixel the same, scaled to 0")):
        if names := (builder.info.metadata or {}).get(kind):
            log(f"Warning: {len(names)} {kind} file(s), {advice}: {_listed(names)}")
    return builder


def write_phantom(config: DataConfig, size: tuple[int, int]) -> Path:
    """Writes the phantom of ``config`` as NIfTI files beside ``tfds_dir`` (or finds it there); returns its folder."""
    held_out = max(2, config.phantom_cases // 6)
    spec = phantom.PhantomSpec(
        train_cases=config.phantom_cases,
        validation_cases=held_out,
        test_cases=held_out,
        slices_per_case=config.phantom_slices,
        size=size,
    )
    name = f"{size[0]}x{size[1]}-{config.phantom_cases}-cases-{config.phantom_slices}-slices"
    return phantom.write_phantom(Path(config.tfds_dir).parent / PHANTOM / name, spec, progress=True)


def _build(builder: HipMri) -> None:
    # TFDS needs a download folder and prints about downloads even where, as here, there are none.
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=unused)


@contextlib.contextmanager
def _one_builder_at_a_time(folder: Path) -> Iterator[None]:
    """Makes a second process that wants to build in ``folder`` wait; removes what killed builds left there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.glob("*/incomplete.*"):  # TFDS's name for a build that is not finished
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _use(built: Path) -> None:
    """Notes that a data set is in use, by a lock that this process holds to its end, and when."""
    note = os.open(built.parent / _USED, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(note, fcntl.LOCK_SH)
    os.utime(note)
    _in_use.append(note)


def _remove_old(folder: Path, most: float) -> Iterator[str]:
    """Removes data sets that no process uses, the longest unused first, until all take at most ``most`` bytes."""
    sizes = {
        note.parent: sum(path.stat().st_size for path in note.parent.rglob("*") if path.is_file())
        for note in folder.glob(f"*/{_USED}")
    }
    for old in sorted(sizes, key=lambda built: (built / _USED).stat().st_mtime):
        if sum(sizes.values()) <= most:
            return
        with (old / _USED).open("a") as note:
            try:
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(old, ignore_errors=True)
        del sizes[old]
        yield old.name
