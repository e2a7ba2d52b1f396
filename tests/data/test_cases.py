"""A case is a patient."""

import re

import pytest

from vqvae_jax.data.cases import case_of, names_patient


@pytest.mark.parametrize(
    ("names", "case"),
    [
        (["keras_slices_train/case_004_week_0_slice_1.nii.gz", "x/case_004_week_7_slice_22.nii.gz"], "case_004"),
        (["semantic_MRs/Case_004_Week0_LFOV.nii.gz", "semantic_MRs/Case_004_Week5_LFOV.nii.gz"], "Case_004"),
        (["IXI-T1/IXI002-Guys-0828-T1.nii.gz", "IXI-T2/IXI002-Guys-0828-T2.nii.gz"], "IXI002"),
        (
            [
                "ADNI/002_S_0295/MPR/2006-04-18/I45108/ADNI_002_S_0295_MR_MPR_20070319_S13408_I45108.nii",
                "ADNI/ADNI_002_S_0295_MR_x_S1_I2.nii",
            ],
            "002_S_0295",
        ),
        (["OAS1_0001_MR1/anat.nii.gz", "oasis/OAS1_0001_MR2.nii.gz"], "OAS1_0001"),
        (["OAS30001_MR_d0129/anat2/sub-x.nii"], "sub-x"),
        (["OAS30001_MR_d0129/anat2/T1.nii", "OAS30001_MR_d0757/anat2/T1.nii"], "OAS30001"),
        (["training/Case00.nii.gz", "Case00.nii"], "Case00"),  # PROMISE12
        (["multicoil_train/file1000001.nii"], "file1000001"),  # fastMRI
        (["10000_1000000_t2w.nii.gz", "10000/10000_1000000_adc.nii.gz"], "10000"),  # PI-CAI
        (["sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz"], "sub-01"),
        (["Task05_Prostate/imagesTr/prostate_00.nii.gz", "Dataset005_Prostate/prostate_00.nii.gz"], "prostate_00"),
        (["1.5T/patient7.nii", "3T/patient7.nii", "v1.0/patient7.nii", "release_2.1/patient7.nii"], "patient7"),
        (["data_256x256/1mm/patient7.nii", "fold_3/patient7.nii", "T2w/patient7.nii"], "patient7"),
        (["p12/t1/a.nii", "p12/b.nii"], "p12"),
        (["ProstateX-0001/t2.nii", "prostatex_keras/ProstateX-0001.nii"], "ProstateX-0001"),
        (["a/scan.nii.gz"], "scan"),
    ],
)
def test_all_files_of_a_patient_are_one_case(names, case):
    assert {case_of(name) for name in names} == {case}


@pytest.mark.parametrize(
    ("name", "pattern", "case"),
    [
        ("batch2/sub-01/anat/sub-01_run-2_T2w.nii.gz", None, "sub-01"),
        ("patient7/series3/T2.nii", None, "patient7"),
        ("prostatex_0001_tra.nii.gz", None, "prostatex_0001"),
        ("all/anna.nii", None, "anna"),
        ("2024/sub-07_run-1.nii", r"sub-\d+", "sub-07"),
        ("2024/sub-07_run-1.nii", r"sub-(\d+)", "07"),
        ("2024/sub-07_run-1.nii", r"sub-(x)?\d+", "sub-07"),
        ("anna.nii.gz", r"sub-\d+", "anna"),
    ],
)
def test_the_case_of_one_name(name, pattern, case):
    assert case_of(name, pattern and re.compile(pattern)) == case


def test_two_patients_are_two_cases():
    pairs = [
        ("IXI-T1/IXI002-Guys-0828-T1.nii.gz", "IXI-T1/IXI012-HH-1211-T1.nii.gz"),
        ("10000_1000000_t2w.nii.gz", "10001_1000001_t2w.nii.gz"),
        ("v1.0/sub-1_T1w.nii", "v1.0/sub-2_T1w.nii"),
        ("1.5T/Case00.nii", "1.5T/Case01.nii"),
    ]
    for first, second in pairs:
        assert case_of(first) != case_of(second)


def test_a_pattern_wins_and_its_first_group_is_the_case():
    assert case_of("x/T1_p77_a.nii", re.compile(r"p\d+")) == "p77"
    assert case_of("x/T1_p77_a.nii", re.compile(r"p(\d+)")) == "77"
    assert case_of("x/IXI002-a.nii", re.compile(r"never")) == "IXI002"


@pytest.mark.parametrize(
    "folder", ["IXI-T1", "T2w", "1.5T", "3T", "v2", "version-1.0.3", "1.0.0", "2D", "0.7mm", "b1000"]
)
def test_modality_field_strength_version_and_size_are_no_patient(folder):
    assert not names_patient(folder)


@pytest.mark.parametrize("folder", ["p1", "patient_0012", "0001", "T1_patient3"])
def test_other_numbers_are_a_patient(folder):
    assert names_patient(folder)
