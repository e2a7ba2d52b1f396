"""inspect_data.py as people run it: on the sets at hand and on the layouts that are common."""

import csv
import re

import nibabel
import numpy as np
import pytest
from conftest import REAL_DATA, run_script

REAL = (
    "prostatex/prostatex_keras_slices_data.zip",
    "prostatex/volumes",
    "promise12/promise12_slices_128.zip",
    "nci/nci_slices.zip",
)


def inspect(path, *flags, cwd):
    done = run_script("inspect_data.py", path, *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def warnings_come_first(lines):
    """Whether the lines begin with all the warnings."""
    kinds = [line.startswith("Warning: ") for line in lines]
    return kinds == sorted(kinds, reverse=True)


@pytest.mark.parametrize("name", REAL)
def test_the_sets_at_hand(name, tmp_path):
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    lines = inspect(path, cwd=tmp_path)
    assert warnings_come_first(lines)
    assert any(line.startswith(f"Data: {path}: ") for line in lines)


def hipmri_slices():
    for split, case in (("train", 1), ("train", 2), ("validate", 3), ("test", 4)):
        for index in (0, 1):
            end = f"{case:03}_week_0_slice_{index}.nii.gz"
            yield f"HipMRI/keras_slices_data/keras_slices_{split}/case_{end}"
            yield f"HipMRI/keras_slices_data/keras_slices_seg_{split}/seg_{end}"


def hipmri_volumes():
    for case in (4, 5, 6):
        for week in (0, 1):
            yield f"semantic_MRs_anon/Case_{case:03}_Week{week}_LFOV.nii.gz"
            yield f"semantic_labels_anon/Case_{case:03}_Week{week}_SEMANTIC_LFOV.nii.gz"


def nnunet():
    for case in range(4):
        yield f"Dataset042_Pelvis/imagesTr/pelvis_{case:03}_0000.nii.gz"
        yield f"Dataset042_Pelvis/labelsTr/pelvis_{case:03}.nii.gz"
    yield "Dataset042_Pelvis/imagesTs/pelvis_100_0000.nii.gz"


def bids():
    for subject in ("01", "02", "03"):
        for session in ("1", "2"):
            yield f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_T1w.nii.gz"
        yield f"derivatives/brain/sub-{subject}/anat/sub-{subject}_desc-brain_mask.nii.gz"


def ixi():
    for case, site in (("002", "Guys-0828"), ("012", "HH-1211"), ("300", "IOP-0920")):
        for kind in ("T1", "T2"):
            yield f"IXI-{kind}/IXI{case}-{site}-{kind}.nii.gz"


def adni():
    for case in ("002_S_0295", "003_S_0907", "005_S_0221"):
        for visit in ("2006-04-18_08_20_30.0", "2007-05-01_10_11_12.0"):
            yield f"ADNI/{case}/MP-RAGE/{visit}/I45108/ADNI_{case}_MR_MP-RAGE_br_raw_20070319_1_I{visit[2:4]}.nii"


def oasis():
    for case in (1, 2, 3):
        for session in (1, 2):
            yield f"disc1/OAS1_{case:04}_MR{session}/PROCESSED/MPRAGE/T88_111/anat.nii.gz"


def promise12():
    for case in range(5):
        yield f"training_data/Case{case:02}.nii.gz"
        yield f"training_data/Case{case:02}_segmentation.nii.gz"


def picai():
    for case in (10000, 10001, 10005):
        for kind in ("t2w", "adc", "hbv"):
            yield f"picai_public_images_fold0/{case}/{case}_{case + 990000}_{kind}.nii.gz"
        yield f"picai_labels/csPCa_lesion_delineations/{case}_{case + 990000}.nii.gz"


def decathlon():
    for case in (0, 1, 2, 4):
        yield f"Task05_Prostate/imagesTr/prostate_{case:02}.nii.gz"
        yield f"Task05_Prostate/labelsTr/prostate_{case:02}.nii.gz"
        yield f"Task05_Prostate/imagesTr/._prostate_{case:02}.nii.gz"
    yield "Task05_Prostate/imagesTs/prostate_03.nii.gz"


LAYOUTS = {  # images, cases, label maps
    hipmri_slices: (8, 4, 8),
    hipmri_volumes: (6, 3, 6),
    nnunet: (5, 5, 4),
    bids: (6, 3, 3),
    ixi: (6, 3, 0),
    adni: (6, 3, 0),
    oasis: (6, 3, 0),
    promise12: (5, 5, 5),
    picai: (9, 3, 3),
    decathlon: (5, 5, 4),
}


def write(root, names):
    """A set of these files, each with the same random voxels."""
    voxels = np.random.default_rng(0).integers(0, 500, (16, 12, 3)).astype(np.int16)
    content = nibabel.Nifti1Image(voxels, np.diag([1.0, 1, 3, 1])).to_bytes()
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_common_layout_is_understood(layout, tmp_path):
    images, cases, labels = LAYOUTS[layout]
    lines = inspect(write(tmp_path / "set", layout()), cwd=tmp_path)
    assert warnings_come_first(lines)
    assert f"Data: {tmp_path / 'set'}: {images} images of {cases} cases" in lines
    found = re.search(r"^Left out: .*?(\d+) label map", "\n".join(lines), re.MULTILINE)
    assert (int(found[1]) if found else 0) == labels
    assert sum(": label map (" in line for line in lines) == labels
    assert not any("several splits" in line for line in lines)


def test_a_table_is_written_edited_and_taken_back(tmp_path):
    write(tmp_path / "set", nnunet())
    lines = inspect("set", "--write", "x.csv", cwd=tmp_path)
    assert lines[-1] == "Written: x.csv (9 files); edit it, and train with --data x.csv"
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all((tmp_path / row["path"]).is_file() for row in rows)
    changed = next(row for row in rows if row["role"] == "label map")
    changed |= {"role": "image", "case": "new", "split": "test"}
    next(row for row in rows if row["split"] == "train")["role"] = "left out"
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    lines = inspect("x.csv", cwd=tmp_path)
    assert "Data: x.csv: 5 images of 5 cases" in lines
    assert any("test 2 files of 2 cases" in line for line in lines)
    assert any("3 label map" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("absent",), "no such file or folder"),
        (("set", "--write", "x.txt"), "ends in .csv"),
        (("set", "--case-pattern", "("), "regular expression"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags, words, tmp_path):
    write(tmp_path / "set", nnunet())
    done = run_script("inspect_data.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line
