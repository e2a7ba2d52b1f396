"""What a file is, by its path."""

import pytest

from vqvae_jax.data.roles import IMAGE, LABEL_MAP, LEFT_OUT, role_of


@pytest.mark.parametrize(
    "name",
    [
        "labelsTr/prostate_00.nii.gz",  # nnU-Net
        "labelsTs/prostate_01.nii.gz",
        "set/seg_train/case_1.nii",
        "semantic_labels_only/Case_004_Week0_LFOV_SEMANTIC.nii.gz",  # HipMRI, 3-D
        "keras_slices_data/keras_slices_seg_train/seg_004_week_0_slice_0.nii.gz",  # HipMRI, slices
        "derivatives/fs/sub-01/anat/sub-01_desc-brain_mask.nii.gz",  # BIDS
        "derivatives/x/sub-01/anat/sub-01_dseg.nii.gz",
        "a/Case00_segmentation.nii.gz",  # PROMISE12
        "a/b_seg.nii.gz",
        "a/b_label.nii",
        "masks/0001.nii.gz",
        "GroundTruth/ground_truth/p1_gt.nii.gz",
        "10000_1000000/roi.NII.GZ",
    ],
)
def test_label_maps_are_told_by_folder_or_name(name):
    assert role_of(name)[0] == LABEL_MAP


@pytest.mark.parametrize(
    "name",
    [
        "imagesTr/prostate_00_0000.nii.gz",
        "semantic_MRs/Case_004_Week0_LFOV.nii.gz",
        "train/legacy/unmasking.nii",  # words, not parts of words
        "Segal/labelled_by_nobody.nii.gz",
        "scan.NII",
        "scan.Nii.Gz",
        "a b/$x[1].nii.gz",
    ],
)
def test_images_are_images(name):
    assert role_of(name) == (IMAGE, "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".hidden/a.nii", "hidden"),
        ("__MACOSX/._a.nii.gz", "hidden"),
        ("a.nii (1).gz", "rename"),
        ("a.nii.gz.part", "rename"),
        ("a.nii.bak", "rename"),
        ("pair.hdr", "convert"),
        ("pair.img.gz", "convert"),
        ("more.zip", "unpack"),
        ("sub/more.tar.gz", "unpack"),
    ],
)
def test_what_is_left_out_says_why(name, words):
    role, reason = role_of(name)
    assert role == LEFT_OUT
    assert words in reason


@pytest.mark.parametrize("name", ["README.md", "a/participants.tsv", "T1w.json", "anii", "IM0001.dcm"])
def test_other_files_are_nobodys_business(name):
    assert role_of(name) is None
