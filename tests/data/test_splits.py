"""Which split and which case a file belongs to: about 80/10/10, no case in two splits, and for ever the same."""

import re
from pathlib import Path

import numpy as np
import pytest

from vqvae_jax.data import phantom, source, splits
from vqvae_jax.data.splits import SPLIT_FOLDERS, case_of, split_by_case


def test_about_80_10_10_of_the_cases_and_no_case_in_two_splits():
    cases = {f"scan{scan}_of_{case}.nii": f"patient {case}" for case in range(2000) for scan in range(2)}
    placed = split_by_case(cases, Path("set"))
    assert placed.keys() == cases.keys()
    assert len(set(placed.values())) == 2000  # (split, case): each case has one split
    shares = [np.mean([split == wanted for split, _ in placed.values()]) for wanted in splits.SPLITS]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)


@pytest.mark.parametrize("count", range(3, 15))
def test_no_split_is_empty_however_few_the_cases(count):
    for first in range(0, 300, 10):
        placed = split_by_case({f"{case}.nii": f"{case}" for case in range(first, first + count)}, Path("set"))
        assert {split for split, _ in placed.values()} == set(splits.SPLITS)


def test_a_case_keeps_its_split_in_another_order_process_or_release_and_with_other_cases():
    cases = {f"{case}.nii": f"case_{case:03d}" for case in range(60)}
    placed = split_by_case(cases, Path("set"))
    assert split_by_case(dict(reversed(cases.items())), Path("set")) == placed
    more = split_by_case(cases | {f"{case}.nii": f"case_{case:03d}" for case in range(60, 90)}, Path("set"))
    assert placed.items() <= more.items()
    # sha256("case_...")[:12] read as a fraction: below 0.1 is test, below 0.2 validation (computed with sha256sum).
    held_out = {case: split for split, case in placed.values() if split != "train"}
    assert held_out == {
        "case_011": "validation",
        "case_020": "test",
        "case_037": "validation",
        "case_049": "validation",
        "case_057": "test",
    }


@pytest.mark.parametrize(
    ("name", "pattern", "case"),
    [
        ("keras_slices_train/case_004_week_0_slice_10.nii.gz", None, "case_004"),
        ("sub-01/anat/T2.nii", None, "sub-01"),
        ("batch2/sub-01/anat/sub-01_run-2_T2w.nii.gz", None, "sub-01"),
        ("patient7/series3/T2.nii", None, "patient7"),
        ("prostatex_0001_tra.nii.gz", None, "prostatex_0001"),
        ("anna.nii.gz", None, "anna"),
        ("all/anna.nii", None, "anna"),
        ("2024/sub-07_run-1.nii", r"sub-\d+", "sub-07"),
        ("2024/sub-07_run-1.nii", r"sub-(\d+)", "07"),
        ("2024/sub-07_run-1.nii", r"sub-(x)?\d+", "sub-07"),
        ("anna.nii.gz", r"sub-\d+", "anna"),
    ],
)
def test_case_of(name, pattern, case):
    assert case_of(name, pattern and re.compile(pattern)) == case


def test_the_phantom_lies_in_the_folders_that_the_splits_are_read_from(tmp_path):
    counts = {"train": 3, "validation": 2, "test": 1}
    cases = {f"{split}_cases": count for split, count in counts.items()}
    spec = phantom.PhantomSpec(**cases, slices_per_case=1, size=(16, 8))
    root = phantom.write_phantom(tmp_path / "phantom", spec)
    assert {path.name for path in root.iterdir() if path.is_dir()} == set(SPLIT_FOLDERS.values())
    found = source.Source(root)
    assert found.is_hipmri
    assert {split: len(found.cases(split)) for split in splits.SPLITS} == counts
    assert phantom.SPLIT_FOLDERS is SPLIT_FOLDERS
