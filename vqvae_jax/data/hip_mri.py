"""The TFDS builder ``hip_mri``: NIfTI files in, an ArrayRecord data set out, without TensorFlow."""

import contextlib
import fcntl
import hashlib
import io
import itertools
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
from vqvae_jax.data import intensity, nifti, phantom, source
from vqvae_jax.data.splits import SPLITS
from vqvae_jax.errors import DataError

PHANTOM = "phantom"
PHANTOM_FOLDER = Path("data/phantom")
_LISTED = 200
_READERS = 2


class HipMri(tfds.core.GeneratorBasedBuilder):
    """MRI slices: raw float32 intensities at their native shape, with geometry and origin.

    Features of a record: ``image`` float32 [H, W]; ``affine`` float64 [4, 4] from (row, column, 0) to mm;
    ``range`` float32 [2], the intensities of the file that become 0 and 1; ``file``, ``case`` text;
    ``week``, ``slice`` int32 (HipMRI's own numbers; in other sets week is -1 and slice the position).

    The folder's name holds a key over the files (names, sizes, times) and the settings that shape the
    records, so that a changed source is built anew.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012
    name = "hip_mri"

    def __init__(self, files: source.Source, config: DataConfig, **kwargs: Any):
        self._files = files
        self._config = config
        self.unreadable: list[str] = []
        self.constant: list[str] = []
        super().__init__(config=build_key(files, config), file_format="array_record", **kwargs)

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
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        entries = [entry for entry in self._files.entries if entry.split == split]
        number = itertools.count()
        for entry, (cut, limits, problem) in zip(entries, _ahead(self._read, entries), strict=True):
            self._bar.update()
            if problem:
                self.unreadable.append(problem)
                continue
            if limits[0] == limits[1]:
                self.constant.append(entry.name)
            for position, piece in enumerate(cut):
                yield (
                    next(number),
                    {
                        "image": piece.pixels,
                        "affine": piece.affine,
                        "range": np.array(limits, np.float32),
                        "file": entry.name,
                        "case": entry.case,
                        "week": entry.week,
                        "slice": entry.slice if entry.slice >= 0 else position,
                    },
                )
        if next(number) == 0:
            self._refuse_empty(split)

    def _read(self, entry: source.Entry) -> tuple[list[nifti.Slice], tuple[float, float], str]:
        try:
            volume = self._files.read(entry)
            limits = intensity.intensity_range(volume.voxels, self._config.scale_percentiles)
            try:
                return nifti.slices(volume, self._config.slice_axis), limits, ""
            except DataError as error:
                raise DataError(f"{entry.name} {error}") from error
        except DataError as error:
            return [], (0.0, 0.0), str(error)

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        with tqdm.tqdm(total=len(self._files.entries), desc="Reading NIfTI files", unit="file") as self._bar:
            super()._download_and_prepare(*args, **kwargs)
        if self.unreadable and self._config.on_bad_file == "error":
            raise DataError(f"{self._unusable()}. Mend or remove them, or leave them out with --on-bad-file skip")
        self.info.metadata.update(unreadable=self.unreadable, constant=self.constant)

    def _refuse_empty(self, split: str) -> None:
        """Stops a build that TFDS would fail anyway; reads the splits after it, to name their bad files too."""
        later = SPLITS[SPLITS.index(split) + 1 :]
        entries = [entry for entry in self._files.entries if entry.split in later]
        self.unreadable += [problem for *_, problem in _ahead(self._read, entries) if problem]
        raise DataError(f"{self._unusable()}. Mend or replace them: split {split} holds no readable file")

    def _unusable(self) -> str:
        count = f"{len(self.unreadable)} of {len(self._files.entries)} files cannot be used"
        return f"{self._files.path}: {count}: {_listed(self.unreadable)}"


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


def build_key(files: source.Source, config: DataConfig) -> str:
    """Name of the built data set's folder: 16 hexadecimal digits over the source and the settings."""
    settings = (
        config.slice_axis,
        config.scale_percentiles,
        config.on_bad_file,
        str(HipMri.VERSION),
        files.fingerprint(),
    )
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def check_exists(config: DataConfig) -> None:
    """Raises DataError where there is no data to prepare."""
    if config.data != PHANTOM:
        source.find_data(config.data)


def name_of(config: DataConfig) -> str:
    """The name of the data set's zip or folder, or "phantom". Raises DataError where there is none."""
    return PHANTOM if config.data == PHANTOM else source.find_data(config.data).name


def prepare(config: DataConfig, phantom_size: tuple[int, int], log: Callable[[str], None] = print) -> HipMri:
    """Finds the files and builds their data set, or opens it where it was built before.

    Args:
      config: where the files are and how to read them; data "phantom" writes the phantom first.
      phantom_size: height and width of phantom slices.
      log: is given lines for people.

    Raises:
      DataError: no data, or files that cannot be read (all are named).
    """
    path = write_phantom(config, phantom_size) if config.data == PHANTOM else source.find_data(config.data)
    files = source.Source(path, config.case_pattern)
    for line in source.describe(files):
        log(line)
    tfds.disable_progress_bar()
    try:
        builder = HipMri(files, config, data_dir=config.tfds_dir)
        built = Path(builder.data_path)
        if not built.exists():
            with _one_builder_at_a_time(built.parents[1]):
                if not built.exists():
                    _build(builder)
                    log(f"Built the data set in {built}")
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to ArrayRecord
        raise DataError(
            f"--tfds-dir {config.tfds_dir}: cannot be written ({error}); free space or choose another"
        ) from error
    builder = HipMri(files, config, data_dir=config.tfds_dir)
    for kind, advice in (("unreadable", "left out"), ("constant", "kept: every pixel the same, scaled to 0")):
        if names := (builder.info.metadata or {}).get(kind):
            log(f"Warning: {len(names)} {kind} file(s), {advice}: {_listed(names)}")
    return builder


def write_phantom(config: DataConfig, size: tuple[int, int]) -> Path:
    """Writes the phantom of ``config`` as NIfTI files (or finds it written) and returns its folder."""
    held_out = max(2, config.phantom_cases // 6)
    spec = phantom.PhantomSpec(
        train_cases=config.phantom_cases,
        validation_cases=held_out,
        test_cases=held_out,
        slices_per_case=config.phantom_slices,
        size=size,
    )
    name = f"{size[0]}x{size[1]}-{config.phantom_cases}-cases-{config.phantom_slices}-slices"
    return phantom.write_phantom(PHANTOM_FOLDER / name, spec, progress=True)


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
