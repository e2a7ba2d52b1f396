"""What a data set holds, as far as names and headers show it: roles, cases, splits, sizes, axes, and doubts.

`scripts/inspect_data.py` prints it; training and evaluation take their files from it.
"""

import collections
import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vqvae_jax.config import DataConfig
from vqvae_jax.data import cases, nifti, roles, slice_axes, splits
from vqvae_jax.data.listing import COLUMNS, Folder, Row, Table, Zip, list_files
from vqvae_jax.data.nifti import Header
from vqvae_jax.errors import ConfigError, DataError
from vqvae_jax.runtime.files import write_whole

DEFAULT_NAME = "HipMRI_study_keras_slices_data"
DEFAULT_FOLDER = Path("data")
EXAMPLES = 3
MOST_LINES = 12
"""Of the summary that training prints."""
SAMPLED = 12
"""Images of whole numbers whose voxels are looked at, for label maps that their names do not show."""
SAMPLED_BYTES = 1 << 26
"""Larger files are not looked at."""
FEW_VALUES = 16
"""So many distinct small whole numbers, or fewer, look like a label map."""
CUT_OFF = "a larger --image-size keeps it, --fit resize shrinks the slices"
SETTLE = "scripts/inspect_data.py --write FILE.csv lists every file; edit it and give --data FILE.csv"


@dataclasses.dataclass(frozen=True)
class Image:
    """One file to take slices from: its place in the data set, and what its header says."""

    name: str
    case: str
    split: str
    size: int
    header: Header
    cut: slice_axes.Cut


class Survey:
    """The files of a data set: ``rows`` of all, ``images`` of those to use, and what is to be said of them.

    Args:
      path: a folder, a zip, or a table of files (see `listing.Table`).
      config: how to read it.
      divide: give every image a split; else all are of the split "whole".

    Attributes:
      rows: a row a file.
      images: in natural order of their names.
      unreadable: name and reason of images whose header cannot be used.
      how: how the splits were found, for people.
      warnings: doubts, each with examples and the flag that settles it.

    Raises:
      DataError: no images; an unsafe or damaged zip or table; or too few cases to split.
      ConfigError: ``case_pattern`` is not a regular expression.
    """

    def __init__(self, path: Path, config: DataConfig, *, divide: bool = True):
        self.path = path
        self.listing: Folder | Zip | Table = list_files(path)
        self.warnings: list[str] = []
        self._config = config
        sizes = self.listing.sizes()
        self.rows = self._given(divide) if isinstance(self.listing, Table) else self._found(sizes, divide)
        self.images, self.unreadable = self._read_headers(sizes)
        self._doubt()

    def _given(self, divide: bool) -> list[Row]:
        """The rows of a table, with what people left empty filled in."""
        pattern = _pattern(self._config.case_pattern)
        rows = []
        for row in self.listing.rows:
            if row.role not in (roles.IMAGE, roles.LABEL_MAP, roles.LEFT_OUT):
                expected = f"{roles.IMAGE}, {roles.LABEL_MAP} or {roles.LEFT_OUT}"
                raise DataError(f"--data {self.path}: {row.path} has the role {row.role!r}; expected {expected}")
            if row.role == roles.IMAGE and divide and row.split not in ("", *splits.SPLITS):
                expected = ", ".join(splits.SPLITS)
                raise DataError(f"--data {self.path}: {row.path} has the split {row.split!r}; expected {expected}")
            rows.append(dataclasses.replace(row, case=row.case or cases.case_of(row.path, pattern)))
        images = [row for row in rows if row.role == roles.IMAGE]
        self.how = "by the table"
        if divide and not all(row.split for row in images):
            if any(row.split for row in images):
                nameless = next(row.path for row in images if not row.split)
                raise DataError(f"--data {self.path}: {nameless} has no split, others have one; fill in all or none")
            placed = splits.divide({row.case for row in images}, splits.SPLITS[1:], self.path)
            rows = [dataclasses.replace(row, split=placed.get(row.case, "")) for row in rows]
            self.how = "by case"
        return rows if divide else [dataclasses.replace(row, split=splits.WHOLE) for row in rows]

    def _found(self, sizes: dict[str, int], divide: bool) -> list[Row]:
        """A row for each file that has to do with NIfTI, by names alone."""
        pattern = _pattern(self._config.case_pattern)
        found = {name: role for name in sorted(sizes, key=_natural) if (role := roles.role_of(name))}
        found |= dict.fromkeys(self._twins(found), (roles.LEFT_OUT, "the same image lies beside it, zipped"))
        images = {name: cases.case_of(name, pattern) for name, (role, _) in found.items() if role == roles.IMAGE}
        if not images:
            raise DataError(f"{self.path}: holds no {_missing(found)}; {_where_to_get_data()}")
        if divide:
            placed = splits.place(images, self.path)
            self.how, split_of = placed.how, placed.splits
            found |= dict.fromkeys(placed.outside, (roles.LEFT_OUT, "in no folder of a split"))
            self._warn(placed.outside, "lie outside the folders of the splits and are left out", SETTLE)
        else:
            self.how, split_of = "not divided", dict.fromkeys(images, splits.WHOLE)
        by_name = [name for name, (role, why) in found.items() if role == roles.LABEL_MAP and "file's name" in why]
        self._warn(by_name, "are taken as label maps by their names and left out", SETTLE)
        mendable = [name for name, (role, why) in found.items() if role == roles.LEFT_OUT and ": " in why]
        self._warn(mendable, "are left out", "; ".join(sorted({found[name][1] for name in mendable})))
        return [
            Row(name, role, images.get(name, ""), split_of.get(name, ""), why) for name, (role, why) in found.items()
        ]

    def _twins(self, found: dict[str, tuple[str, str]]) -> list[str]:
        """Images that lie unzipped beside their .nii.gz."""
        names = {name for name, (role, _) in found.items() if role == roles.IMAGE}
        twins = [name for name in sorted(names) if f"{name}.gz" in names]
        self._warn(twins, "lie beside a .nii.gz of the same name, which is taken in their place", SETTLE)
        return twins

    def _read_headers(self, sizes: dict[str, int]) -> tuple[list[Image], list[tuple[str, str]]]:
        images, unreadable = [], []
        for row in self.rows:
            if row.role != roles.IMAGE:
                continue
            try:
                with self.listing.open(row.path) as stream:
                    header = nifti.read_header(stream)
                cut = slice_axes.choose(header, self._config.slice_axis, self._config.slice_direction)
                image = Image(row.path, row.case, row.split, sizes[row.path], header, cut)
                nifti.check_slice_shape(_slice_shape(image))
            except DataError as error:
                unreadable.append((row.path, str(error)))
                continue
            images.append(image)
        reasons = dict(unreadable)
        self.rows = [dataclasses.replace(row, reason=reasons.get(row.path, row.reason)) for row in self.rows]
        return images, unreadable

    def _doubt(self) -> None:
        """Warnings that need the headers."""
        split_of, case_of = ({image.name: getattr(image, of) for image in self.images} for of in ("split", "case"))
        shared = splits.shared_cases(split_of, case_of)
        self._warn(list(shared), "lie in several splits", "--case-pattern, or other folders", "cases")
        self._warn([name for name, _ in self.unreadable], "have headers that cannot be used", "--on-bad-file skip")
        doubts = collections.defaultdict(list)
        for image in self.images:
            if image.cut.doubt:
                doubts[image.cut.doubt].append(image.name)
        for doubt, names in doubts.items():
            self._warn(
                names, f"are cut along axis {self._axis(names[0])}: {doubt}", "--slice-axis or --slice-direction"
            )
        directions = self._directions()
        if len(directions) > 1:
            several = "; ".join(f"{way} {len(names)} ({names[0]})" for way, names in directions.items())
            self.warnings.append(
                f"volumes are cut along several directions: {several}; --slice-direction cuts all along one"
            )
        flat = [image for image in self.images if image.cut.axis is None]
        if len(flat) > 1 and len({image.case for image in flat}) == len(flat):
            names = [image.name for image in flat]
            self._warn(
                names, "are slices that are each a case of its own: one patient may lie in two splits", "--case-pattern"
            )
        self._warn(self._like_label_maps(), "hold a few small whole numbers, like label maps", SETTLE)

    def _like_label_maps(self) -> list[str]:
        """Of a sample of the images, those whose voxels look like labels."""
        whole = [image for image in self.images if image.header.whole_numbers and image.size <= SAMPLED_BYTES]
        chosen = np.unique(np.linspace(0, len(whole) - 1, min(SAMPLED, len(whole))).round().astype(int))
        found = []
        for image in (whole[index] for index in chosen):
            try:
                voxels = self.read(image).voxels
            except DataError:
                continue  # said when it is read for use
            values = np.unique(voxels)
            if 1 < values.size <= FEW_VALUES and np.abs(values).max() < 256:
                found.append(image.name)
        return found

    def _axis(self, name: str) -> int | None:
        return next(image.cut.axis for image in self.images if image.name == name)

    def _directions(self) -> dict[str, list[str]]:
        """Names of volumes by the direction that they are cut along, where that is known."""
        found = collections.defaultdict(list)
        for image in self.images:
            if image.cut.axis is not None and image.header.directions:
                found[image.header.directions[image.cut.axis]].append(image.name)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    @property
    def direction(self) -> str | None:
        """The anatomical direction across which all slices lie; None where there are several, or one is not known."""
        found = {
            ways and ways[2 if i.cut.axis is None else i.cut.axis]
            for i in self.images
            for ways in [i.header.directions]
        }
        return found.pop() if len(found) == 1 else None

    def check_fit(self, image_size: tuple[int, int]) -> None:
        """Warns of slices that padding and cropping to a model's size cuts off."""
        if self._config.fit == "resize":
            return
        larger = [
            image.name
            for image in self.images
            if any(side > most for side, most in zip(_slice_shape(image), image_size, strict=True))
        ]
        size = " x ".join(map(str, image_size))
        self._warn(larger, f"have slices larger than the model's {size}: what lies outside is cut off", CUT_OFF)

    def slices(self, split: str) -> int:
        """How many slices the images of a split are cut into, by their headers."""
        chosen = [image for image in self.images if image.split == split]
        return sum(1 if image.cut.axis is None else image.header.shape[image.cut.axis] for image in chosen)

    def read(self, image: Image) -> nifti.Volume:
        """The voxels of an image. Raises DataError, naming the file."""
        try:
            with self.listing.open(image.name) as stream:
                return nifti.read(stream, image.size, nan=self._config.nan)
        except DataError as error:
            raise DataError(f"{image.name} {error}") from error

    def fingerprint(self) -> str:
        """Changes with the images' names, contents, cases, splits and axes; not with their times or their place."""
        facts = [(i.name, i.case, i.split, i.cut.axis, self.listing.digest(i.name)) for i in self.images]
        return repr((facts, self.unreadable))

    def _warn(self, names: Sequence[str], what: str, flag: str, kind: str = "files") -> None:
        if names:
            settled = f"; {flag}" if flag else ""
            self.warnings.append(f"{len(names)} {kind} {what} ({_examples(names)}){settled}")

    def summary(self) -> list[str]:
        """At most MOST_LINES lines for people, warnings first."""
        facts = self.facts()
        room = MOST_LINES - len(facts)
        shown = [f"Warning: {text}" for text in self.warnings]
        if len(shown) > room:
            shown = [*shown[: room - 1], f"Warning: {len(shown) - room + 1} more; scripts/inspect_data.py shows them"]
        return [*shown, *facts]

    def facts(self) -> list[str]:
        """What was found, in at most six lines for people."""
        volumes = [image for image in self.images if image.cut.axis is not None]
        lines = [
            f"Data: {self.path}: {len(self.images)} images of {len({image.case for image in self.images})} cases",
            f"Splits ({self.how}): {self._splits()}",
            *self._left_out(),
            f"Sizes: {_counted(_shape_text(image) for image in self.images)}",
            f"Voxels: {_counted(_spacing_text(image) for image in self.images)}",
        ]
        if volumes:
            lines.append(f"Volumes are cut along {_counted(self._cut_text(image) for image in volumes)}")
        return lines

    def _cut_text(self, image: Image) -> str:
        ways = image.header.directions
        direction = f", {ways[image.cut.axis]}" if ways else ""
        return f"axis {image.cut.axis}{direction}"

    def _splits(self) -> str:
        parts = []
        for split in (*splits.SPLITS, splits.WHOLE):
            images = [image for image in self.images if image.split == split]
            if images:
                parts.append(f"{split} {len(images)} files of {len({image.case for image in images})} cases")
        return ", ".join(parts)

    def _left_out(self) -> Iterable[str]:
        left = [row for row in self.rows if row.role != roles.IMAGE]
        if left:
            kinds = collections.defaultdict(list)
            for row in left:
                kinds[row.role if row.role == roles.LABEL_MAP else row.reason].append(row.path)
            parts = [f"{len(names)} {kind} ({_examples(names)})" for kind, names in kinds.items()]
            yield "Left out: " + "; ".join(parts[:EXAMPLES]) + ("; ..." if len(parts) > EXAMPLES else "")

    def write(self, path: Path) -> None:
        """Writes a row a file, as `listing.Table` reads it. Raises OSError."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(COLUMNS)
        for row in self.rows:
            table.writerow([self._portable(row.path, path.parent), row.role, row.case, row.split, row.reason])
        write_whole(path, text.getvalue())

    def _portable(self, name: str, folder: Path) -> str:
        """A file's path relative to the table's folder where it lies below it, else absolute."""
        root = self.path.parent if isinstance(self.listing, Table) else self.path
        place = Path(os.path.abspath(root / name))
        folder = Path(os.path.abspath(folder))
        return (place.relative_to(folder) if place.is_relative_to(folder) else place).as_posix()


def find_data(path: str | None) -> Path:
    """The data set's zip, folder or table: ``path``, or the default place.

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


def _missing(found: dict[str, tuple[str, str]]) -> str:
    """What a data set without images does not hold, and what it holds instead."""
    counts = collections.Counter(role if role == roles.LABEL_MAP else why for role, why in found.values())
    if not counts:
        return ".nii or .nii.gz files"
    return "images: " + ", ".join(f"{count} left out ({why})" for why, count in counts.most_common()) + f"; {SETTLE}"


def _pattern(text: str | None) -> re.Pattern | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise ConfigError(f"--case-pattern {text!r} is not a regular expression: {error}") from error


def _natural(name: str) -> list:
    """Sort key that puts slice 2 before slice 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)], name


def _examples(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def _counted(texts: Iterable[str]) -> str:
    """Texts by how often they occur, the rarest left out."""
    counts = collections.Counter(texts)
    shown = [f"{text} ({count})" for text, count in counts.most_common(EXAMPLES)]
    more = f", and {len(counts) - EXAMPLES} more" if len(counts) > EXAMPLES else ""
    return ", ".join(shown) + more


def _slice_shape(image: Image) -> tuple[int, ...]:
    return tuple(side for axis, side in enumerate(image.header.shape) if axis != image.cut.axis)


def _shape_text(image: Image) -> str:
    return " x ".join(map(str, image.header.shape))


def _spacing_text(image: Image) -> str:
    return " x ".join(f"{side:.3g}" for side in image.header.spacing) + " mm"
