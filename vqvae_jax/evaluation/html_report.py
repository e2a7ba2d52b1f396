"""The HTML report of an evaluation: one page that needs no network, with figures, curves, and slices to compare."""

import base64
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
import numpy as np
from PIL import Image

from vqvae_jax.config import Config
from vqvae_jax.data import hip_mri
from vqvae_jax.evaluation import SHOWN, charts, pictures, table
from vqvae_jax.evaluation.evaluate import EvaluatedRun
from vqvae_jax.evaluation.table import Evaluation
from vqvae_jax.runtime import distributed, runs
from vqvae_jax.runtime.files import write_whole

REPORT = "report.html"
FIRST_SHOWN = 6
"""Slices that are on the page before "Show more" is pressed."""
_SPLITS = {
    "train": "slices the model was trained on, so the figures flatter it",
    "validation": "slices the model was not trained on, but by which its best checkpoint was chosen",
    "test": "slices the model never saw while it was trained or chosen",
}
_CURVES = (
    ("Training loss", "train", "loss"),
    ("SSIM on validation slices", "validation", "ssim"),
    ("PSNR on validation slices (dB)", "validation", "psnr"),
    ("Perplexity: codes in effective use", "validation", "perplexity"),
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One shown slice: its index in the split, and its original and reconstruction, [H, W] in [0, 1]."""

    index: int
    original: np.ndarray
    reconstruction: np.ndarray


@dataclasses.dataclass(frozen=True)
class About:
    """What is said of a run.

    Attributes:
      run, split: their names.
      protocol: how figures were measured.
      facts: of the model and the data, by name.
      seen: what the model has seen of the split, or empty where that is not known.
    """

    run: str
    split: str
    protocol: str
    facts: dict[str, str]
    seen: str = ""


@dataclasses.dataclass(frozen=True)
class _Figure:
    name: str
    value: str
    meaning: str


def write(run_dir: Path, split: str | None, which: str, evaluated: EvaluatedRun, limit: int = SHOWN) -> Path:
    """Writes report.html beside the results of an evaluated run, from the first process; all must call it.

    Args:
      run_dir: the run's folder, whose metrics.jsonl gives the curves; without one, the page has none.
      split: train, validation or test; None for all images of other data.
      which: which checkpoint was evaluated.
      evaluated: what `evaluate.evaluate_run` returned.
      limit: the most slices to show.

    Returns:
      The page's path.
    """
    indices = shown_slices(evaluated.evaluation.order(), limit)
    shown = (
        Picture(index, sample.pixels, own)
        for index, (sample, own) in zip(indices, evaluated.reconstruct(indices), strict=True)
    )
    config = evaluated.config
    history = read_history(run_dir / runs.METRICS)
    # Of other files, or a model that was trained elsewhere, the split's name says nothing.
    known = history and config.data.data == runs.load_config(run_dir).data.data
    seen = _SPLITS[split] if known and split else ""
    about = About(run_dir.resolve().name, evaluated.folder.name, table.protocol(config), _facts(config, which), seen)
    text = render(about, evaluated.evaluation, history, shown)
    path = evaluated.folder / REPORT
    if distributed.is_first():
        write_whole(path, text)
    return path


def render(about: About, result: Evaluation, history: Sequence[dict[str, Any]], shown: Iterable[Picture]) -> str:
    """The page, in ASCII. ``history`` holds the objects of metrics.jsonl."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vqvae_jax.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    style, script = (environment.loader.get_source(environment, f"report.{kind}")[0] for kind in ("css", "js"))
    text = environment.get_template("report.html").render(
        about=about,
        total=len(result.rows),
        codes=len(result.counts),
        figures=_figures(result),
        more_figures=_more_figures(result),
        charts=[chart for chart in _charts(result, history) if chart],
        slices=_cards(result, shown),
        prior=_prior(result),
        settings={"shown": FIRST_SHOWN, "colours": _colours(), "limit": pictures.DIFFERENCE_LIMIT},
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        # Only this script may run, whatever a file's name holds.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


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
    """At most ``limit`` of the slices, in ``order`` (worst first): the worst, the best, the median, others between.

    They are evenly spaced; fewer than three cannot hold all of the named ones.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    count = min(limit, len(order))
    places = np.linspace(0, len(order) - 1, count).round().astype(int)
    if count > 2:
        places[count // 2] = len(order) // 2
    return [order[place] for place in places]


def png_data_uri(image: np.ndarray) -> str:
    """An image [H, W] in [0, 1] as an 8-bit grey PNG of H columns and W rows; NaN is black.

    Transposed as in ``pictures.draw_reconstructions``.
    """
    grey = np.rint(np.clip(np.nan_to_num(image.T), 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _number(value: float, digits: int, unit: str = "") -> str:
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "not measured"


def _figures(result: Evaluation) -> list[_Figure]:
    """The headline figures, each with a sentence that needs no other knowledge."""
    of = result.summary()
    bits = of["bits_per_pixel"]
    smaller = f" An 8-bit picture spends 8: {8 / bits:.0f} times as many." if 0 < bits < 8 else ""
    return [
        _Figure(
            "SSIM",
            _number(of["ssim"], 3),
            "Structural similarity: how alike original and reconstruction look in small patches; 1 is identical. "
            f"Lowest {_number(of['ssim_lowest'], 3)}, highest {_number(of['ssim_highest'], 3)}.",
        ),
        _Figure(
            "PSNR",
            _number(of["psnr"], 1, " dB"),
            "The full grey scale against the typical error, on a logarithmic scale: 6 dB more are half the error.",
        ),
        _Figure(
            "MS-SSIM",
            _number(of["ms_ssim"], 3),
            "SSIM over coarse and fine scales; it forgives lost fine texture more than SSIM does.",
        ),
        _Figure(
            "Mean error",
            _number(of["mae"] * 100, 2, " %"),
            "How far a pixel's brightness is off on average, in percent of the full grey scale.",
        ),
        _Figure(
            "Bits per pixel",
            _number(bits, 3),
            f"What the codes of a slice take to store.{smaller} "
            f"Entropy coding could bring it to {_number(of['bits_per_pixel_entropy'], 3)}.",
        ),
        _Figure(
            "Codes used",
            _number(of["codebook_usage"] * 100, 0, " %"),
            "The share of the codebook that these slices need; much less than all is capacity that lies idle.",
        ),
    ]


def _prior(result: Evaluation) -> dict[str, Any] | None:
    """What the section on the prior shows: figures, and the samples' picture where there are samples."""
    if result.prior is None:
        return None
    of, samples = result.summary(), result.prior.samples
    figures = [
        _Figure(
            "Bits per code",
            _number(of["prior_bits_per_code"], 2),
            f"By the prior, given the slices before; {math.log2(len(result.counts)):.2f} without one.",
        ),
        _Figure(
            "Bits per pixel",
            _number(of["prior_bits_per_pixel"], 3),
            "What the codes take in a .vqz file that encode.py writes.",
        ),
    ]
    if samples is None:
        return {"figures": figures}
    figures += [
        _Figure(
            "Kernel distance",
            _number(samples.kernel_distance, 4),
            "How far samples are from test slices, by VGG16's features. Training slices are "
            f"{_number(samples.kernel_distance_real, 4)} away from them.",
        ),
        _Figure(
            "MS-SSIM of samples",
            _number(samples.ms_ssim, 3),
            f"How alike two samples are; two test slices have {_number(samples.ms_ssim_real, 3)}.",
        ),
        _Figure(
            "Near a training slice",
            _number(100 * samples.near_training, 1, " %"),
            "Samples nearer to a training slice than 95 % of rebuilt test slices are. Much above 5 % is memorization.",
        ),
    ]
    picture = base64.b64encode(pictures.grid_png(samples.pairs)).decode("ascii")
    return {"figures": figures, "count": samples.count, "picture": f"data:image/png;base64,{picture}"}


def _more_figures(result: Evaluation) -> dict[str, str]:
    return {
        name: f"{value:.6g}" if math.isfinite(value) else "not measured" for name, value in result.summary().items()
    }


def _charts(result: Evaluation, history: Sequence[dict[str, Any]]) -> Iterable[charts.Chart | None]:
    yield charts.histogram("SSIM of the slices", [row.ssim for row in result.rows], "SSIM (dashed: the mean)")
    shares = 100 * np.sort(result.counts)[::-1] / max(result.counts.sum(), 1)
    points = {"codes": list(enumerate(shares, start=1))}
    even = (100 / len(shares), "even use")
    label = "used codes, the most used first (dashed: even use)"
    yield charts.lines("Share of each code (%)", points, label, level=even, logarithmic=True)
    for title, split, key in _CURVES:
        yield charts.lines(title, {key.replace("ssim", "SSIM"): _curve(history, split, key)}, "training step")


def _curve(history: Sequence[dict[str, Any]], split: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of a scalar in the steps' order; of a step that was run twice, the later entry."""
    found = {}
    for entry in history:
        step, value = entry.get("step"), entry.get(key)
        if entry.get("split") == split and all(type(number) in (int, float) for number in (step, value)):
            found[step] = value
    return sorted((float(step), float(value)) for step, value in found.items())


def _cards(result: Evaluation, shown: Iterable[Picture]) -> list[dict[str, Any]]:
    """What the template needs of each shown slice, in the split's order."""
    order = result.order()
    marks = {order[len(order) // 2]: "median", order[-1]: "best", order[0]: "worst"}
    cards = []
    for picture in shown:
        row = result.rows[picture.index]
        cards.append(
            {
                "index": picture.index,
                "name": Path(row.file).name or row.file,
                "slice": row.slice,
                "mark": marks.get(picture.index, "") if len(order) > 1 else "",
                "width": row.height,  # drawn transposed
                "height": row.width,
                "ssim": _number(row.ssim, 4),
                "psnr": _number(row.psnr, 2, " dB"),
                "mae": _number(row.mae * 100, 2, " %"),
                "original": png_data_uri(picture.original),
                "reconstruction": png_data_uri(picture.reconstruction),
                # What the script sorts by; NaN has no place in an order and goes last.
                "keys": {key: v if math.isfinite(v := getattr(row, key)) else "" for key in ("ssim", "psnr")},
            }
        )
    return sorted(cards, key=lambda card: card["index"])


def _facts(config: Config, which: str) -> dict[str, str]:
    model = config.model
    return {
        "Preset": config.preset,
        "Checkpoint": f"{which} (by validation SSIM)" if which == "best" else which,
        "Data": hip_mri.name_of(config.data),
        "Model's image": "{} x {}".format(*model.image_size),
        "Codes of an image": "{} x {}, out of {}".format(*model.latent_size, model.num_embeddings),
    }


def _colours() -> list[list[int]]:
    """The 256 colours of the difference picture, those of ``pictures.draw_reconstructions``."""
    return (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(int).tolist()
