"""Which slices follow one another."""

import numpy as np

from vqvae_jax.data.volumes import neighbours, volumes

HIPMRI = [f"keras_slices_train/case_{case}_week_{week}_slice_{z}.nii.gz" for case, week, z in
          [("004", 0, 2), ("004", 0, 1), ("004", 1, 1), ("005", 0, 2), ("004", 0, 0)]]  # fmt: skip


def test_hipmri_volumes_are_a_case_and_a_week():
    found = volumes(HIPMRI, ["case_004"] * 3 + ["case_005", "case_004"], [2, 1, 1, 2, 0])
    np.testing.assert_array_equal(found, [0, 0, 1, 2, 0])
    np.testing.assert_array_equal(neighbours(found, [2, 1, 1, 2, 0], -1), [1, 4, -1, -1, -1])
    np.testing.assert_array_equal(neighbours(found, [2, 1, 1, 2, 0], -2), [4, -1, -1, -1, -1])
    np.testing.assert_array_equal(neighbours(found, [2, 1, 1, 2, 0], 1), [-1, 0, -1, -1, 1])


def test_other_volumes_are_files():
    found = volumes(["a/t2.nii", "a/t2.nii", "b/t2.nii"], ["a", "a", "a"], [0, 1, 1])
    np.testing.assert_array_equal(found, [0, 0, 1])
    np.testing.assert_array_equal(neighbours(found, [0, 1, 1], -1), [-1, 0, -1])


def test_the_same_case_in_two_folders_is_two_volumes():
    names = [f"{folder}/case_1_week_0_slice_{z}.nii" for folder in "ab" for z in (0, 1)]
    np.testing.assert_array_equal(volumes(names, ["case_1"] * 4, [0, 1, 0, 1]), [0, 0, 1, 1])
