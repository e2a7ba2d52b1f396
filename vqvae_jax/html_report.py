"""What the HTML report of an evaluation is made of: the run's history, which slices are shown, and their pixels."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def read_history(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; lines that are none are left out, and a missing file is an empty history."""
    if not path.is_file():
        return []
    history = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            history.append(entry)
    return history


def shown_slices(order: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` of the slices, evenly spaced in ``order`` (worst first), with the worst and the best."""
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    places = np.linspace(0, len(order) - 1, min(limit, len(order))).round().astype(int)
    return [order[place] for place in places]


def png_data_uri(image: np.ndarray) -> str:
    """An image [H, W] in [0, 1] as an 8-bit grey PNG of H columns and W rows; NaN is black.

    Transposed as in ``report.draw_reconstructions``.
    """
    grey = np.rint(np.clip(np.nan_to_num(image.T), 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
