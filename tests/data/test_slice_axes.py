"""Which axis a volume is cut along: what the header says before what the voxels' spacing suggests."""

import io

import nibabel
import numpy as np
import pytest

from vqvae_jax.data import nifti, slice_axes
from vqvae_jax.errors import DataError

TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]


def volume(spacing=(1, 1, 1), shape=(8, 9, 10), dim_info=None):
    affine = np.eye(4)
    affine[:3, :3] = TURN * spacing  # oblique: no axis of the scanner is an axis of the voxels
    image = nibabel.Nifti1Image(np.zeros(shape, np.int16), affine)
    if dim_info:
        image.header.set_dim_info(*dim_info)
    content = image.to_bytes()
    return nifti.read(io.BytesIO(content), len(content))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("odd", [3, 0.4])
def test_the_axis_whose_spacing_stands_out_is_that_of_the_slices(axis, odd):
    spacing = np.array([0.9, 0.9, 0.9])
    spacing[axis] = odd
    found, reason = slice_axes.choose(volume(spacing), None, fallback=(axis + 1) % 3)
    assert found == axis
    assert f"{odd:.3g} mm" in reason


@pytest.mark.parametrize("fallback", [-1, 0, 1])
def test_nearly_equal_spacings_leave_it_to_the_run(fallback):
    found, reason = slice_axes.choose(volume((0.98, 1, 1.01)), None, fallback)
    assert found == fallback % 3
    assert "training" in reason


def test_dim_info_wins_over_spacing_and_what_is_asked_over_both():
    named = volume((1, 1, 3), dim_info=(2, 1, 0))
    assert slice_axes.choose(named, None, -1) == (0, "by the header's dim_info")
    assert slice_axes.choose(named, -2, -1) == (1, "as asked")


def test_a_file_of_one_slice_has_nothing_to_choose():
    assert slice_axes.choose(volume(shape=(8, 9)), 7, -1)[0] is None
    assert slice_axes.choose(volume((1, 1, 3), (8, 1, 9)), 0, -1)[0] == 1


@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_that_does_not_exist_is_refused(axis):
    with pytest.raises(DataError, match=f"no axis {axis}"):
        slice_axes.choose(volume(), axis, -1)
