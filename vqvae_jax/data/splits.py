"""Which split and which case (patient) a file belongs to, by its path."""

import hashlib
import re
from pathlib import Path, PurePosixPath

from vqvae_jax.errors import DataError

SPLIT_FOLDERS = {
    "train": "keras_slices_train",
    "validation": "keras_slices_validate",
    "test": "keras_slices_test",
}
"""Folders of HipMRI's own splits."""
SPLITS = tuple(SPLIT_FOLDERS)
SEGMENTATION_PREFIX = "keras_slices_seg_"
_HELD_OUT_SHARE = 0.1
_BIDS_SUBJECT = re.compile(r"(?<![^/_])sub-[A-Za-z0-9]+")
_HIPMRI_NAME = re.compile(r"(?P<case>case_[^_/]+)_week_(?P<week>\d+)_slice_(?P<slice>\d+)\.nii")


def path_of(name: str) -> PurePosixPath:
    return PurePosixPath(name.replace("\\", "/"))  # some Windows programs zip with backslashes


def is_image(name: str) -> bool:
    parts = path_of(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and not any(part.startswith(SEGMENTATION_PREFIX) for part in parts[:-1])


def place(found: dict, path: Path, pattern: re.Pattern | None) -> tuple[bool, dict[str, tuple[str, str]]]:
    """Split and case of every file that is part of the data set; and whether it brings its own splits."""
    split_of = {folder: split for split, folder in SPLIT_FOLDERS.items()}
    given = {}
    for name in found:
        for folder in path_of(name).parts[:-1][:2]:
            if folder in split_of:
                given[name] = (split_of[folder], case_of(name, pattern))
                break
    if not given:
        return False, split_by_case({name: case_of(name, pattern) for name in found}, path)
    there = {split for split, _ in given.values()}
    missing = [folder for split, folder in SPLIT_FOLDERS.items() if split not in there]
    if missing:
        raise DataError(
            f"{path}: holds no .nii or .nii.gz files in {', '.join(missing)}, which the HipMRI layout needs beside "
            f"{', '.join(folder for folder in split_of if folder not in missing)}; add them, or rename the "
            "folders to have the files split by case"
        )
    return True, given


def case_of(name: str, pattern: re.Pattern | None = None) -> str:
    """The case (patient) that a file belongs to, from its path below the data set's root.

    By default ``case_<id>`` of HipMRI names, or BIDS's ``sub-<label>``; else the first folder with a digit in
    its name; else the file name up to and with its first number (``prostatex_0001_tra.nii.gz`` ->
    ``prostatex_0001``); else the file name. With ``pattern``: what it matches (its first group if it has
    one), else as above.
    """
    if pattern and (match := pattern.search(name)):
        return (pattern.groups and match.group(1)) or match.group()
    path = path_of(name)
    if match := _HIPMRI_NAME.search(path.name):
        return match["case"]
    if match := _BIDS_SUBJECT.search(name):
        return match[0]
    for folder in path.parts[:-1]:
        if re.search(r"\d", folder):
            return folder
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    match = re.match(r"\D*\d+", stem)
    return match[0] if match else stem


def split_by_case(cases: dict[str, str], path: Path) -> dict[str, tuple[str, str]]:
    """Splits files 80/10/10 by a stable hash of their case: {name: case} to {name: (split, case)}.

    A case keeps its split when others are added; only where validation or testing would be empty does
    the case of the next lowest hash move there.

    Raises:
      DataError: fewer than three cases.
    """
    ranks = {case: int(hashlib.sha256(case.encode()).hexdigest()[:12], 16) / 16**12 for case in set(cases.values())}
    if len(ranks) < len(SPLITS):
        raise DataError(
            f"{path}: its {len(cases)} files belong to {len(ranks)} case(s) ({', '.join(sorted(ranks))}), and a split "
            "by case needs 3 or more; set --case-pattern, or make folders keras_slices_train, keras_slices_validate "
            "and keras_slices_test"
        )
    splits = {
        case: "test" if rank < _HELD_OUT_SHARE else "validation" if rank < 2 * _HELD_OUT_SHARE else "train"
        for case, rank in ranks.items()
    }
    for wanted in SPLITS:
        if wanted not in splits.values():
            most = max(SPLITS, key=list(splits.values()).count)
            lowest = min((case for case in splits if splits[case] == most), key=ranks.get)
            splits[lowest] = wanted
    return {name: (splits[case], case) for name, case in cases.items()}


def week_and_slice(name: str) -> tuple[int, int]:
    match = _HIPMRI_NAME.search(name)
    return (int(match["week"]), int(match["slice"])) if match else (-1, -1)
