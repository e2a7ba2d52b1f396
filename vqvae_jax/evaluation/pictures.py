"""Pictures of reconstructions."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vqvae_jax.runtime.files import write_whole

DIFFERENCE_LIMIT = 0.25
"""Absolute differences of this and more are drawn in the brightest colour."""
_PANEL_INCHES = 3.4
"""Width of a panel, and its greatest height: a caption has room above any slice."""
_CAPTION_INCHES = 0.2
_DPI = 100
_FONT_SIZE = 7
_LONGEST_LABEL = 64
"""Characters that have room above a panel."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One slice to draw: images [H, W] in [0, 1], what it is, and its SSIM."""

    original: np.ndarray
    reconstruction: np.ndarray
    label: str
    ssim: float


def draw_reconstructions(path: Path, rows: Sequence[Row]) -> None:
    """Writes a PNG with a line a slice: original, reconstruction with its SSIM, absolute difference.

    The first axis of a slice (left-right in HipMRI) runs to the right and the second downwards.
    """
    tallest = max(row.original.shape[1] / row.original.shape[0] for row in rows)
    height = _PANEL_INCHES * min(1, tallest) + _CAPTION_INCHES
    figure = Figure(figsize=(3 * _PANEL_INCHES, height * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        difference = np.abs(row.reconstruction - row.original)
        line[0].imshow(row.original.T, cmap="gray", vmin=0, vmax=1)
        line[0].set_title(_drawable(row.label), fontsize=_FONT_SIZE, parse_math=False)
        line[1].imshow(row.reconstruction.T, cmap="gray", vmin=0, vmax=1)
        line[1].set_title(f"reconstruction, SSIM {row.ssim:.4f}", fontsize=_FONT_SIZE)
        line[2].imshow(difference.T, cmap="magma", vmin=0, vmax=DIFFERENCE_LIMIT)
        line[2].set_title(
            f"absolute difference, mean {difference.mean():.4f}, white {DIFFERENCE_LIMIT}", fontsize=_FONT_SIZE
        )
    for panel in axes.flat:
        panel.set_axis_off()
    png = io.BytesIO()
    figure.savefig(png, dpi=_DPI)
    write_whole(path, png.getvalue())


def draw_grid(path: Path, images: np.ndarray) -> None:
    """Writes `grid_png` of images."""
    write_whole(path, grid_png(images))


def grid_png(images: np.ndarray) -> bytes:
    """A PNG with images [N, H, W] in [0, 1] side by side, about as wide as high.

    The first axis of a slice runs to the right and the second downwards, as in the other pictures.
    """
    count, width, height = images.shape
    columns = max(1, min(count, round((count * height / width) ** 0.5)))
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height + 2, width + 2), np.uint8)
    cells[:count, 1:-1, 1:-1] = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8).transpose(0, 2, 1)
    cells = cells.reshape(rows, columns, height + 2, width + 2).transpose(0, 2, 1, 3)
    png = io.BytesIO()
    Image.fromarray(cells.reshape(rows * (height + 2), -1)).save(png, "png")
    return png.getvalue()


def _drawable(text: str) -> str:
    """A text that can be drawn: characters that the font lacks are escaped, the middle of a long one left out."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    drawn = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else _escaped(c) for c in text)
    half = (_LONGEST_LABEL - 3) // 2
    return drawn if len(drawn) <= _LONGEST_LABEL else f"{drawn[:half]}...{drawn[-half:]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
