"""Which split a case belongs to: about 80/10/10, no case in two splits, and for ever the same; folders before all."""

from pathlib import Path

import numpy as np
import pytest

from vqvae_jax.config import DataConfig
from vqvae_jax.data import phantom, splits
from vqvae_jax.data.splits import SPLIT_FOLDERS, divide, place
from vqvae_jax.data.survey import Survey
from vqvae_jax.errors import DataError

SET = Path("set")
HELD_OUT = splits.SPLITS[1:]


def test_about_80_10_10_of_the_cases_and_no_case_in_two_splits():
    cases = {f"scan{scan}_of_{case}.nii": f"patient {case}" for case in range(2000) for scan in range(2)}
    placed = place(cases, SET)
    assert placed.splits.keys() == cases.keys()
    assert placed.outside == []
    assert len({(cases[name], split) for name, split in placed.splits.items()}) == 2000  # each case has one split
    by_case = divide(set(cases.values()), HELD_OUT, SET)
    assert placed.splits == {name: by_case[case] for name, case in cases.items()}
    shares = [np.mean([split == wanted for split in by_case.values()]) for wanted in splits.SPLITS]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)


@pytest.mark.parametrize("held_out", [HELD_OUT, ("validation",), ("test",)])
@pytest.mark.parametrize("count", range(3, 15))
def test_no_split_is_empty_however_few_the_cases(count, held_out):
    for first in range(0, 300, 10):
        placed = divide({f"{case}" for case in range(first, first + count)}, held_out, SET)
        assert set(placed.values()) == {"train", *held_out}


def test_a_case_keeps_its_split_in_another_order_process_or_release_and_with_other_cases():
    cases = [f"case_{case:03d}" for case in range(60)]
    placed = divide(set(cases), HELD_OUT, SET)
    assert divide(set(reversed(cases)), HELD_OUT, SET) == placed
    more = divide({*cases, *(f"case_{case:03d}" for case in range(60, 90))}, HELD_OUT, SET)
    assert placed.items() <= more.items()
    # sha256("case_...")[:12] read as a fraction: below 0.1 is test, below 0.2 validation (computed with sha256sum).
    held_out = {case: split for case, split in placed.items() if split != "train"}
    assert held_out == {
        "case_011": "validation",
        "case_020": "test",
        "case_037": "validation",
        "case_049": "validation",
        "case_057": "test",
    }


def test_too_few_cases_are_named():
    with pytest.raises(DataError, match=r"belong to 2 case\(s\) \(a, b\).*--case-pattern"):
        divide({"b", "a"}, HELD_OUT, SET)


@pytest.mark.parametrize("there", [("train",), ("test",), ("validation",), ("train", "test"), ("validation", "test")])
def test_missing_splits_are_made_from_what_is_there_by_case(there):
    cases = {f"{split}/{case}_{scan}.nii": f"{split}{case}" for split in there for case in range(9) for scan in "ab"}
    placed = place(cases, SET)
    assert set(placed.splits.values()) == set(splits.SPLITS)
    donor = "train" if "train" in there else there[0]
    missing = [split for split in splits.SPLITS if split not in there]
    assert placed.how.endswith(f"{' and '.join(missing)} made from {donor} by case")
    for name, split in placed.splits.items():
        assert name.startswith((donor, split))  # only the donor gives files away
        assert split == placed.splits[name.replace("_a", "_b")]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a/b/c/train/x.nii", "train"),
        ("keras_slices_validate/x.nii", "validation"),
        ("HipMRI/keras_slices_data/keras_slices_test/x.nii", "test"),
        ("imagesTr/x.nii", "train"),
        ("imagesTs/x.nii", "test"),
        ("Validation_Set/x.nii", "validation"),
        ("TESTING/x.nii", "test"),
        ("train/test/x.nii", "train"),
        ("train.nii", None),
        ("trains/x.nii", None),
        ("latest/x.nii", None),
        ("training_site_oslo/x.nii", None),
    ],
)
def test_the_split_of_a_path(name, split):
    assert splits.split_of_path(name) == split


def test_the_phantom_lies_in_the_folders_that_the_splits_are_read_from(tmp_path):
    counts = {"train": 3, "validation": 2, "test": 1}
    cases = {f"{split}_cases": count for split, count in counts.items()}
    spec = phantom.PhantomSpec(**cases, slices_per_case=1, size=(16, 8))
    root = phantom.write_phantom(tmp_path / "phantom", spec)
    assert {path.name for path in root.iterdir() if path.is_dir()} == set(SPLIT_FOLDERS.values())
    found = Survey(root, DataConfig())
    assert found.how == "its own folders"
    assert {split: len({i.case for i in found.images if i.split == split}) for split in splits.SPLITS} == counts
    assert phantom.SPLIT_FOLDERS is SPLIT_FOLDERS
