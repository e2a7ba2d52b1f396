"""Find and read the NIfTI files of a data set, in a zip or a folder."""

import dataclasses
import hashlib
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

from vqvae_jax.data import nifti, splits
from vqvae_jax.errors import ConfigError, DataError

SUFFIXES = (".nii", ".nii.gz")
DEFAULT_NAME = "HipMRI_study_keras_slices_data"
DEFAULT_FOLDER = Path("data")
MAX_UNZIPPED_BYTES = 256 * 2**30
"""A zip that announces more than this is refused; the HipMRI study unzips to about 1 GB."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a data set. ``name`` is its path below the data set's root, with forward slashes."""

    name: str
    size: int
    modified: str
    split: str
    case: str
    week: int
    slice: int


def find_data(path: str | None) -> Path:
    """The data set's zip or folder: ``path``, or the default place.

    Raises:
      DataError: nothing is there.
    """
    if path is not None:
        if not os.path.exists(path):  # unlike Path.exists, false where a folder above it may not be entered
            raise DataError(f"--data {path}: no such file or folder; {_where_to_get_data()}")
        return Path(path)
    folder = DEFAULT_FOLDER / DEFAULT_NAME
    for candidate in (folder, folder.with_suffix(".zip")):
        if candidate.exists():
            return candidate
    raise DataError(f"no data: neither {folder} nor {folder}.zip exists; {_where_to_get_data()}")


def _where_to_get_data() -> str:
    return (
        f"put the HipMRI slices at {DEFAULT_FOLDER / DEFAULT_NAME}[.zip], give --data a zip or a folder of "
        ".nii or .nii.gz files, or train with --preset demo, which makes its own"
    )


class Source:
    """The NIfTI files of a zip or a folder, each with its split and case.

    A set with the folders ``keras_slices_train``, ``_validate`` and ``_test`` (at the top or one folder
    down) keeps those splits; ``keras_slices_seg_*`` is never read. Any other set is split by case,
    80/10/10, by a stable hash of the case's name.

    Args:
      path: the zip or folder.
      case_pattern: regular expression whose match in a file's name is its case; see ``splits.case_of``.

    Raises:
      DataError: no NIfTI files, an unsafe or damaged zip, a missing split, or too few cases to split.
      ConfigError: ``case_pattern`` is not a regular expression.
    """

    def __init__(self, path: Path, case_pattern: str | None = None):
        self.path = path
        try:
            pattern = re.compile(case_pattern) if case_pattern else None
        except re.error as error:
            raise ConfigError(f"--case-pattern {case_pattern!r} is not a regular expression: {error}") from error
        if path.is_dir():
            self._zip = None
            found = _list_folder(path)
        else:
            self._zip = _open_zip(path)
            found = _list_zip(self._zip, path)
        found = {name: facts for name, facts in found.items() if splits.is_image(name)}
        if not found:
            raise DataError(f"{path}: holds no .nii or .nii.gz files; {_where_to_get_data()}")
        self.is_hipmri, places = splits.place(found, path, pattern)
        self.entries = [
            Entry(name, *found[name], split, case, *splits.week_and_slice(name))
            for name, (split, case) in sorted(places.items(), key=lambda item: (_natural(item[0]), item[0]))
        ]

    def read(self, entry: Entry) -> nifti.Volume:
        """The voxels of one file. Raises DataError, naming the file."""
        try:
            return nifti.read(self.path / entry.name) if self._zip is None else self._read_member(entry)
        except DataError as error:
            raise DataError(f"{entry.name} {error}") from error

    def _read_member(self, entry: Entry) -> nifti.Volume:
        try:
            with self._zip.open(entry.name) as stream:
                return nifti.read(stream, entry.size)
        except DataError:
            raise
        except Exception as error:  # zipfile and its decompressors raise many kinds
            raise DataError(f"cannot be read from the zip ({type(error).__name__}: {error})") from error

    def fingerprint(self) -> str:
        """Changes whenever a file is added, removed, resized or touched, or changes its split."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(repr(dataclasses.astuple(entry)).encode())
        return digest.hexdigest()

    def cases(self, split: str) -> set[str]:
        """Names of the cases in a split."""
        return {entry.case for entry in self.entries if entry.split == split}


def _list_folder(root: Path) -> dict[str, tuple[int, str]]:
    found = {}
    for folder, below, names in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        here = Path(folder).resolve()
        below[:] = [name for name in below if not here.is_relative_to((here / name).resolve())]  # links in a circle
        for name in names:
            if name.endswith(SUFFIXES):
                path = Path(folder, name)
                relative = path.relative_to(root).as_posix()
                if re.search("[\udc80-\udcff]", relative):  # how Python spells bytes that are not UTF-8
                    raise DataError(f"{root}: the file name {relative!a} is not UTF-8; rename it")
                found[relative] = _size_and_time(path)
    return found


def _size_and_time(path: Path) -> tuple[int, str]:
    try:
        facts = path.stat()
    except OSError:  # a broken link, say: reading it will tell, together with the other bad files
        return 0, ""
    return facts.st_size, str(facts.st_mtime_ns)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or remove it") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"{path}: not a folder and not a readable zip ({error}); download it again") from error


def _list_zip(archive: zipfile.ZipFile, path: Path) -> dict[str, tuple[int, str]]:
    found, total = {}, 0
    for info in archive.infolist():
        parts = splits.path_of(info.filename).parts
        if ".." in parts or info.filename.startswith(("/", "\\")) or (parts and parts[0].endswith(":")):
            raise DataError(f"{path}: member {info.filename!r} points outside the zip's own folder; repack it without")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{path}: member {info.filename!r} is a symbolic link; repack the zip with the file itself")
        total += info.file_size
        if total > MAX_UNZIPPED_BYTES:
            raise DataError(
                f"{path}: announces more than {MAX_UNZIPPED_BYTES >> 30} GiB unzipped; give --data a folder"
            )
        if info.filename.endswith(SUFFIXES):
            found[info.filename] = (info.file_size, f"{info.date_time} {info.CRC:08x}")
    return found


def _natural(name: str) -> list:
    """Sort key that puts slice 2 before slice 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def describe(source: Source) -> Iterator[str]:
    """Lines for people: where the data is and how it was split."""
    how = "its own splits" if source.is_hipmri else "split by case"
    counts = ", ".join(
        f"{split} {sum(entry.split == split for entry in source.entries)} files of {len(source.cases(split))} cases"
        for split in splits.SPLITS
    )
    yield f"Data: {source.path} ({how}): {counts}"
