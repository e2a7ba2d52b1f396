"""The picture of reconstructions: upright, on a fixed grey scale, differences visible."""

import numpy as np
from matplotlib.image import imread

from vqvae_jax.evaluation.pictures import Row, draw_reconstructions


def drawn(tmp_path, original, reconstruction):
    path = tmp_path / "new folder" / "picture.png"
    draw_reconstructions(path, [Row(original, reconstruction, "a slice", 0.5)] * 2)
    return imread(path)[..., :3].mean(axis=-1)


def halves(picture):
    """Mean brightness of the middle of the first line's panels: [panel, left or right]."""
    height = len(picture)
    line = picture[height // 8 : height * 3 // 8]
    panels = np.array_split(line, 3, axis=1)
    return np.array([[part.mean() for part in np.array_split(panel[:, 20:-20], 2, axis=1)] for panel in panels])


def test_the_first_axis_runs_to_the_right(tmp_path):
    original = np.zeros((64, 32))
    original[:32] = 1  # left half
    found = halves(drawn(tmp_path, original, original))
    assert (found[:2, 0] > found[:2, 1] + 0.5).all()
    assert (found[2] < 0.2).all()


def test_a_difference_is_bright_where_it_is(tmp_path):
    original = np.zeros((64, 32))
    wrong = original.copy()
    wrong[32:] = 0.25  # right half
    found = halves(drawn(tmp_path, original, wrong))
    assert found[2, 1] > found[2, 0] + 0.3
