"""The files below a folder, in a zip, or in a table: their names and sizes, and how to open them."""

import collections
import csv
import dataclasses
import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vqvae_jax.errors import DataError

MAX_UNZIPPED_BYTES = 256 * 2**30
"""A zip that announces more than this is refused; the HipMRI study unzips to about 1 GB."""
HEAD_BYTES = 1 << 12
"""What is read of a file to see its header, and what of its end to tell it from another."""
COLUMNS = ("path", "role", "case", "split", "reason")
"""Of a table of files."""
_COMPRESSION = {0: "none", 8: "deflate", 12: "bzip2", 14: "LZMA"}
"""Methods of a zip that Python reads, by their numbers in the format."""


def list_files(path: Path) -> "Folder | Zip | Table":
    """What lies at ``path``: a folder, a zip, or a table (.csv) with the columns COLUMNS.

    Raises:
      DataError: it is none of them; or an unsafe or damaged zip or table. The message names it.
    """
    if path.is_dir():
        return Folder(path)
    name = path.name.lower()
    if name.endswith(".csv"):
        return Table(path)
    if name.endswith((".nii", ".nii.gz", ".hdr", ".img")):
        raise DataError(f"--data {path}: is one NIfTI file; give the folder it lies in")
    return Zip(path)


class Folder:
    """The files below a folder; linked folders are followed. Names are UTF-8, whatever the locale."""

    def __init__(self, root: Path):
        self.path = root

    def sizes(self) -> dict[str, int]:
        """Bytes by path below the folder."""
        found = {}
        way_here = {str(self.path): {self.path.resolve()}}  # what the folders on the way to each one really are
        for folder, below, names in os.walk(self.path, followlinks=True, onerror=_raise_unreadable):
            way = way_here.pop(folder)
            really = {name: Path(folder, name).resolve() for name in below}
            below[:] = [name for name in below if really[name] not in way]  # links in a circle
            way_here |= {os.path.join(folder, name): way | {really[name]} for name in below}
            for name in names:
                relative = os.fsencode(Path(folder, name).relative_to(self.path).as_posix())
                relative = relative.decode("utf-8", "surrogateescape")
                if re.search("[\udc80-\udcff]", relative):  # how Python spells bytes that are not UTF-8
                    if ".nii" in relative.lower():
                        raise DataError(f"{self.path}: the file name {relative!a} is not UTF-8; rename it")
                    continue
                # A broken link has no size: reading it will tell, together with the other bad files.
                found[relative] = self.size(relative) or 0
        return found

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where it cannot be found."""
        try:
            return self._place(name).stat().st_size
        except OSError:
            return None

    def _place(self, name: str) -> Path:
        return self.path / os.fsdecode(name.encode("utf-8", "surrogateescape"))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A stream of a file's bytes."""
        path = self._place(name)
        try:
            if path.is_fifo():  # opening it would wait for a writer
                raise DataError("is a pipe; expected a file")
            with path.open("rb") as stream:
                yield stream
        except OSError as error:
            raise DataError(f"cannot be opened ({error.strerror or error})") from error

    def digest(self, name: str) -> str:
        """Of size, beginning and end."""
        with self.open(name) as stream:
            size = stream.seek(0, os.SEEK_END)
            parts = [str(size).encode()]
            for start in (0, max(0, size // 2), max(0, size - HEAD_BYTES)):
                stream.seek(start)
                parts.append(stream.read(HEAD_BYTES))
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class Zip:
    """The members of a zip."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise DataError(f"{path}: not a folder and not a readable zip ({error}); download it again") from error
        self._members = {PurePosixPath(info.filename.replace("\\", "/")).as_posix(): info for info in self._infos()}

    def _infos(self) -> Iterator[zipfile.ZipInfo]:
        total = 0
        for info in self._zip.infolist():
            parts = info.filename.replace("\\", "/").split("/")  # some Windows programs zip with backslashes
            if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
                raise DataError(
                    f"{self.path}: member {info.filename!r} points outside the zip's own folder; repack it without"
                )
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(
                    f"{self.path}: member {info.filename!r} is a symbolic link; repack the zip with the file itself"
                )
            total += info.file_size
            if total > MAX_UNZIPPED_BYTES:
                raise DataError(
                    f"{self.path}: announces more than {MAX_UNZIPPED_BYTES >> 30} GiB unzipped; give --data a folder"
                )
            if not info.is_dir():
                yield info

    def sizes(self) -> dict[str, int]:
        """Unzipped bytes by member; backslashes in names are slashes here."""
        return {name: info.file_size for name, info in self._members.items()}

    def size(self, name: str) -> int | None:
        """Unzipped bytes of a member, or None where there is none."""
        return self._members[name].file_size if name in self._members else None

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A stream of a member's bytes."""
        info = self._members[name]
        if info.compress_type not in _COMPRESSION:
            raise DataError(
                f"is packed by method {info.compress_type} (9 is Deflate64, which Windows uses above 2 GB); "
                "unpack the zip, and give --data the folder"
            )
        try:
            with self._zip.open(info) as stream:
                yield stream
        except DataError:
            raise
        except Exception as error:  # zipfile and its decompressors raise many kinds
            raise DataError(f"cannot be read from the zip ({type(error).__name__}: {error})") from error

    def digest(self, name: str) -> str:
        """Of size and checksum."""
        info = self._members[name]
        return f"{info.file_size:x}-{info.CRC:08x}"


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or remove it") from error


@dataclasses.dataclass(frozen=True)
class Row:
    """One file: what it is (image, label map or left out), its case and split, and why."""

    path: str
    role: str
    case: str
    split: str
    reason: str


class Table:
    """The files that a table names, as `survey.write` writes it; people may have edited it.

    Paths are absolute, or relative to the table's folder. A path may go through a zip.
    """

    def __init__(self, path: Path):
        self.path = path
        self._zips: dict[Path, Zip] = {}
        self.rows = self._read()
        self._places = {row.path: self._place(row.path) for row in self.rows}

    def _read(self) -> list[Row]:
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--data {self.path}: cannot be read ({error}); save it as CSV in UTF-8") from error
        table = csv.DictReader(io.StringIO(text, newline=""))
        missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
        if missing:
            raise DataError(
                f"--data {self.path}: has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, as "
                "scripts/inspect_data.py --write makes it"
            )
        rows = [Row(*((line[name] or "").strip() for name in COLUMNS)) for line in table]
        counts = collections.Counter(row.path for row in rows)
        for name, count in counts.most_common(1):
            if count > 1:
                raise DataError(f"--data {self.path}: names {name} twice; remove one of the rows")
        return rows

    def _place(self, name: str) -> tuple[Folder | Zip, str]:
        """The folder or zip that holds a path, and its name there."""
        path = self.path.parent / name
        for archive in path.parents:
            if archive.is_file():
                if archive not in self._zips:
                    self._zips[archive] = Zip(archive)
                return self._zips[archive], path.relative_to(archive).as_posix()
        return Folder(path.parent), path.name

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that the table names. Raises DataError where one is not there."""
        found = {name: listing.size(inner) for name, (listing, inner) in self._places.items()}
        missing = [name for name, size in found.items() if size is None]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(f"--data {self.path}: names files that are not there: {', '.join(missing[:3])}{more}")
        return found

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A stream of a file's bytes."""
        listing, inner = self._places[name]
        with listing.open(inner) as stream:
            yield stream

    def digest(self, name: str) -> str:
        """As of the folder or zip that it lies in."""
        listing, inner = self._places[name]
        return listing.digest(inner)
