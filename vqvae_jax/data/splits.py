"""Which split a file belongs to: by its folders, or by a stable hash of its case."""

import dataclasses
import hashlib
import re
from pathlib import Path, PurePosixPath

from vqvae_jax.data.roles import words
from vqvae_jax.errors import DataError

SPLIT_FOLDERS = {
    "train": "keras_slices_train",
    "validation": "keras_slices_validate",
    "test": "keras_slices_test",
}
"""Folders of HipMRI's own splits."""
SPLITS = tuple(SPLIT_FOLDERS)
WHOLE = "whole"
"""The one split of a data set that is not divided."""
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "validation"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}
_BESIDE_IT = {
    *("keras", "slices", "slice", "images", "image", "imgs", "img", "data", "dataset", "set"),
    *("mr", "mri", "mrs", "nifti", "semantic", "split"),
}
"""Words that may stand beside a split's in a folder's name: keras_slices_train, imagesTr, train_set."""
_HELD_OUT_SHARE = 0.1
_HIPMRI_NAME = re.compile(r"case_[^_/]+_week_(?P<week>\d+)_slice_(?P<slice>\d+)\.nii", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Placed:
    """Splits of files by name; ``how`` they were found, for people; and files that lie in no split's folder."""

    splits: dict[str, str]
    how: str
    outside: list[str]


def split_of_folder(folder: str) -> str | None:
    """The split that a folder's name stands for, if any: train, imagesTr, keras_slices_validate."""
    rest = [word for word in words(folder) if word not in _BESIDE_IT]
    return _SPLIT_OF_WORD.get(rest[0]) if len(rest) == 1 else None


def split_of_path(name: str) -> str | None:
    """The split of the first folder above a file, at any depth, that stands for one."""
    found = map(split_of_folder, PurePosixPath(name).parts[:-1])
    return next(filter(None, found), None)


def place(cases: dict[str, str], path: Path) -> Placed:
    """Splits of files, {name: case}.

    Folders that are named like splits give them. Where there are none, all files are divided by case, 80/10/10. Where
    one or two splits are missing, they are made from the others: a tenth of the cases each, from the training split
    if there is one, else from the largest (of two as large, the validation split).

    Raises:
      DataError: fewer cases than splits to make.
    """
    given = {name: split for name in cases if (split := split_of_path(name))}
    if not given:
        by_case = divide(set(cases.values()), SPLITS[1:], path)
        return Placed({name: by_case[case] for name, case in cases.items()}, "by case", [])
    outside = [name for name in cases if name not in given]
    there = [split for split in SPLITS if split in given.values()]
    missing = [split for split in SPLITS if split not in there]
    if not missing:
        return Placed(given, "its own folders", outside)
    sizes = {split: list(given.values()).count(split) for split in there}
    donor = "train" if "train" in there else max(sizes, key=sizes.get)
    held_out = tuple(split for split in SPLITS[1:] if split in missing or split == donor)
    made = divide({cases[name] for name, split in given.items() if split == donor}, held_out, path)
    splits = {name: made[cases[name]] if split == donor else split for name, split in given.items()}
    return Placed(splits, f"its own folders; {' and '.join(missing)} made from {donor} by case", outside)


def divide(cases: set[str], held_out: tuple[str, ...], path: Path) -> dict[str, str]:
    """Divides cases by a stable hash of their names: a tenth to each of ``held_out``, the others to train.

    A case keeps its split when others are added. Only where a split would be empty does the case of the next lowest
    hash move there.

    Raises:
      DataError: fewer cases than splits.
    """
    ranks = {case: int(hashlib.sha256(case.encode()).hexdigest()[:12], 16) / 16**12 for case in cases}
    wanted = ("train", *held_out)
    if len(ranks) < len(wanted):
        raise DataError(
            f"{path}: its files belong to {len(ranks)} case(s) ({', '.join(sorted(ranks))}), and a split by case "
            f"into {', '.join(wanted)} needs {len(wanted)} or more; set --case-pattern, or make folders "
            f"{', '.join(SPLIT_FOLDERS.values())}"
        )
    order = [split for split in ("test", "validation") if split in held_out]  # from the lowest hash
    splits = {
        case: next((split for place, split in enumerate(order, 1) if rank < place * _HELD_OUT_SHARE), "train")
        for case, rank in ranks.items()
    }
    for split in wanted:
        if split not in splits.values():
            largest = max(wanted, key=list(splits.values()).count)
            lowest = min((case for case in splits if splits[case] == largest), key=ranks.get)
            splits[lowest] = split
    return splits


def shared_cases(splits: dict[str, str], cases: dict[str, str]) -> dict[str, set[str]]:
    """Cases that lie in several splits, with those."""
    found: dict[str, set[str]] = {}
    for name, split in splits.items():
        found.setdefault(cases[name], set()).add(split)
    return {case: several for case, several in sorted(found.items()) if len(several) > 1}


def week_and_slice(name: str) -> tuple[int, int]:
    """HipMRI's numbers in a file's name; -1 where it has none."""
    match = _HIPMRI_NAME.search(name)
    return (int(match["week"]), int(match["slice"])) if match else (-1, -1)
