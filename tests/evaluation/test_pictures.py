"""The picture of reconstructions: upright, on a fixed grey scale, differences visible."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from vqvae_jax.evaluation import pictures
from vqvae_jax.evaluation.pictures import Row, _drawable, draw_reconstructions


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


NAMES = {
    "mathematics": "$\\frac{1$_2^ $x$.nii",
    "unbalanced": "a$b.nii",
    "scripts": "患者 مريض пациент ü.nii",
    "emoji": "🧠.nii",
    "not text": "\udce4.nii",
    "control characters": "a\nb\tc\x07.nii",
    "long": "x" * 250,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_is_drawn_without_a_warning(tmp_path, name):
    image = np.zeros((64, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_reconstructions(tmp_path / "picture.png", [Row(image, image, f"slice 1: {name}, slice 0", 0.5)])
    assert (tmp_path / "picture.png").is_file()


def test_what_the_font_lacks_is_escaped_and_a_long_label_keeps_its_ends():
    assert _drawable("a$b [ü] ж") == "a$b [ü] ж"
    assert _drawable("患\n") == "\\u60a3\\n"
    shown = _drawable("worst: " + "x" * 250 + ", slice 7")
    assert shown.startswith("worst: x") and shown.endswith("x, slice 7") and "..." in shown and len(shown) <= 64


@pytest.mark.parametrize("shape", [(64, 32), (64, 64), (32, 96)], ids=["wide", "square", "tall"])
def test_captions_do_not_touch(tmp_path, monkeypatch, shape):
    """The longest label that is drawn ends before the next panel's caption begins."""
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(pictures, "Figure", Kept)
    image = np.zeros(shape)
    draw_reconstructions(tmp_path / "picture.png", [Row(image, image, "slice_" * 20, 0.5)] * 2)
    (figure,) = figures
    captions = [axes.title.get_window_extent() for axes in figure.axes]
    assert len(captions) == 6
    for line in (captions[:3], captions[3:]):
        assert line[0].x0 >= 0 and line[0].x1 < line[1].x0 and line[1].x1 < line[2].x0
        assert line[2].x1 <= figure.bbox.x1
