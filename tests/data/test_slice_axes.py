"""Which axis a volume is cut along: what the header says before what the voxels' spacing suggests."""

import io

import nibabel
import numpy as np
import pytest

from vqvae_jax.data import nifti, slice_axes
from vqvae_jax.errors import DataError

TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]


def header(spacing=(1, 1, 1), shape=(8, 9, 10), dim_info=None, turn=TURN, placed=True):
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing  # oblique: no axis of the scanner is an axis of the voxels
    image = nibabel.Nifti1Image(np.zeros(shape, np.int16), affine if placed else None)
    if not placed:
        image.header["pixdim"][1:4] = spacing
    if dim_info:
        image.header.set_dim_info(*dim_info)
    return nifti.read_header(io.BytesIO(image.to_bytes()))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("odd", [3, 0.4])
@pytest.mark.parametrize("placed", [False, True])
def test_the_axis_whose_spacing_stands_out_is_that_of_the_slices(axis, odd, placed):
    spacing = np.array([0.9, 0.9, 0.9])
    spacing[axis] = odd
    cut = slice_axes.choose(header(spacing, placed=placed))
    assert (cut.axis, cut.doubt) == (axis, "")
    assert f"{odd:.3g} mm" in cut.reason


def test_nearly_equal_spacings_are_cut_along_the_last_axis_with_a_doubt():
    cut = slice_axes.choose(header((0.98, 1, 1.01)))
    assert cut.axis == 2
    assert "guess" in cut.doubt


def test_dim_info_wins_over_spacing_and_what_is_asked_over_both():
    named = header((1, 1, 3), dim_info=(2, 1, 0))
    assert slice_axes.choose(named) == slice_axes.Cut(0, "by the header's dim_info")
    assert slice_axes.choose(named, -2) == slice_axes.Cut(1, "as asked")
    assert slice_axes.choose(named, -2, "head-foot") == slice_axes.Cut(1, "as asked")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("mirrored", [1, -1])
def test_a_direction_is_found_wherever_its_axis_lies_before_spacing_and_dim_info(order, mirrored):
    turn = np.eye(3)[:, order] * mirrored
    ways = [("left-right", "front-back", "head-foot")[axis] for axis in order]
    named = header((1, 1, 3), dim_info=(2, 1, 0), turn=turn)
    assert named.directions == tuple(ways)
    for axis, way in enumerate(ways):
        assert slice_axes.choose(named, None, way) == slice_axes.Cut(axis, way)


def test_a_direction_in_a_file_that_does_not_say_how_it_lies_is_a_doubt():
    cut = slice_axes.choose(header((3, 1, 1), placed=False), None, "head-foot")
    assert cut.axis == 0
    assert "does not say which axis is head-foot" in cut.doubt


def test_a_file_of_one_slice_has_nothing_to_choose():
    assert slice_axes.choose(header(shape=(8, 9)), 7).axis is None
    assert slice_axes.choose(header((1, 1, 3), (8, 1, 9)), 0, "head-foot").axis == 1


@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_that_does_not_exist_is_refused(axis):
    with pytest.raises(DataError, match=f"no axis {axis}"):
        slice_axes.choose(header(), axis)
