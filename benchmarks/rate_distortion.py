"""SSIM, PSNR and perceptual distance against bits per pixel: trained runs beside JPEG, JPEG 2000, WebP and AVIF.

    python benchmarks/rate_distortion.py --runs runs/A [runs/B ...] --out runs/rate [--vgg-weights FILE]

All see the same test slices in [0, 1], each on its own grid; the codecs get them rounded to 8 bits. Writes
rate_distortion.png and rate_distortion.md, which says who wins at each run's rate.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import _image_codecs
import _measure
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from vqvae_jax.data import loader
from vqvae_jax.errors import ConfigError
from vqvae_jax.evaluation.evaluate import open_run
from vqvae_jax.evaluation.evaluator import Evaluator
from vqvae_jax.models import vgg_weights
from vqvae_jax.runtime.files import write_whole
from vqvae_jax.training.state import Variables

METRICS = {"ssim": ("SSIM", 1), "psnr": ("PSNR, dB", 1), "perceptual": ("perceptual distance", -1)}
"""What each is called, and whether more of it is better (1) or less (-1)."""
COUNTS = {
    "log2 K a code": ("bits_per_pixel", False),
    "the codes' entropy": ("bits_per_pixel_entropy", False),
    "log2 K a code, no codec's header": ("bits_per_pixel", True),
}
"""How bits are counted -> of which of a run's metrics, and whether the codecs' headers are left out too."""
_PROTOCOL = (
    "Every metric is taken on the slice's own grid against the original in [0, 1] and averaged over the slices; SSIM "
    "by scikit-image's definition (7x7 uniform window, data_range 1). The codecs get the slices in 8 bits; their bits "
    "are those of whole files, headers included, over all pixels, and their figures at a run's rate are interpolated "
    "between settings. A run's bits are its codes' alone: log2 K each, or the entropy of their frequencies in these "
    "slices, which an ideal entropy coder that knows them would need. Neither counts a file header or the model; where "
    "no codec's header is counted either, a codec is given the bytes of its file of one pixel beyond the run's rate."
)
Curves = dict[str, dict[str, np.ndarray]]
"""Codec -> what ``_image_codecs.curves`` found of it."""
_DRAWN_RATES = (0.03, 3)
_TICKS = (0.03, 0.06, 0.125, 0.25, 0.5, 1, 2)
_DPI = 110


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's name, its test metrics, and the slices they were taken from."""

    name: str
    summary: dict[str, float]
    samples: list[loader.Sample]


def evaluate(run_dir: Path, name: str, data: str | None, vgg_variables: Variables | None) -> Run:
    """Metrics of a run's best checkpoint on its test split, or on that of ``data``. Writes nothing into the run."""
    config, variables, slices = open_run(run_dir, "test", data=data)
    # One definition of the perceptual distance for all, whatever layers a run was trained with.
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual_layers=_image_codecs.LAYERS))
    found = Evaluator(config, slices, vgg_variables).run(variables, keep=range(len(slices)))
    return Run(name, found.summary(), [found.kept[index][0] for index in range(len(slices))])


def check_same_slices(runs: Sequence[Run]) -> None:
    """Raises ConfigError where runs were not measured on the same pixels, so that they cannot be compared."""
    first, *others = runs
    for run in others:
        same = len(run.samples) == len(first.samples) and all(
            np.array_equal(a.pixels, b.pixels) for a, b in zip(first.samples, run.samples, strict=True)
        )
        if not same:
            raise ConfigError(
                f"--runs: {run.name} is tested on other slices than {first.name}, or scales them otherwise; give runs "
                "of the same data, or --data for all"
            )


def verdict(run: Run, counted: str, metric: str, curves: Curves, headers: dict[str, float]) -> str:
    """Who wins at a run's rate, in one sentence. ``headers``: each codec's, in bits per pixel of these slices."""
    bits, values = _at_run(run, counted, metric, curves, headers)
    name, sign = METRICS[metric]
    contenders = {f"`{run.name}`": run.summary[metric]}
    contenders |= {codec: value for codec, value in values.items() if not math.isnan(value)}
    order = sorted(contenders, key=lambda who: -sign * contenders[who])
    ranking = ", then ".join(f"{who} ({_digits(metric, contenders[who])})" for who in order)
    absent = "".join(f"; {_absence(codec, curves[codec], bits)}" for codec in values if codec not in contenders)
    return f"{name} at {bits:.3f} bits per pixel ({counted}): **{order[0]} wins**. {ranking}{absent}."


def _at_run(
    run: Run, counted: str, metric: str, curves: Curves, headers: dict[str, float]
) -> tuple[float, dict[str, float]]:
    """A run's bits per pixel, and the codecs' values of a metric there; NaN where they have none."""
    rate, without_headers = COUNTS[counted]
    bits = run.summary[rate]
    extra = headers if without_headers else dict.fromkeys(headers, 0)
    return bits, {codec: _image_codecs.at_rate(curve, bits + extra[codec], metric) for codec, curve in curves.items()}


def _absence(codec: str, curve: dict[str, np.ndarray], bits: float) -> str:
    smallest, largest = curve["bits_per_pixel"][[0, -1]]
    if bits < smallest:
        return f"{codec} makes no files this small (at least {smallest:.3f} bits per pixel)"
    return f"{codec} was not tried above {largest:.3f} bits per pixel"


def _digits(metric: str, value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}" if metric == "psnr" else f"{value:.4f}"


def tables(runs: Sequence[Run], codecs: Sequence[_image_codecs.Codec], curves: Curves) -> str:
    """The Markdown file: how it was measured, a table a metric, who wins, and what the files' headers cost."""
    samples = runs[0].samples
    pixels = sum(sample.pixels.size for sample in samples) / len(samples)
    cases = len({sample.case for sample in samples})
    measured = f"{len(samples)} test slices of {cases} case(s), {pixels:.0f} pixels each on average. {_PROTOCOL}"
    smallest = {codec.name: codec.smallest() for codec in codecs}
    headers = {name: 8 * size / pixels for name, size in smallest.items()}
    blocks = ["# Rate and distortion", measured]
    for metric, (name, sign) in METRICS.items():
        if metric in runs[0].summary:
            better = "higher" if sign > 0 else "lower"
            blocks += [f"## {name} ({better} is better)", _comparison(runs, metric, curves, headers)]
            blocks.append("\n".join(_verdicts(runs, metric, curves, headers)))
    bits = runs[0].summary["bits_per_pixel"]
    rows = [
        (codec.name, codec.effort, str(smallest[codec.name]), f"{headers[codec.name] / bits:.0%}") for codec in codecs
    ]
    header = ("codec", "set to", "bytes of a file of one pixel", f"share of {bits:.3f} bits per pixel")
    blocks += ["## What headers cost", _measure.table(header, rows), f"Measured on {_measure.machine()}."]
    return "\n\n".join(blocks) + "\n"


def _comparison(runs: Sequence[Run], metric: str, curves: Curves, headers: dict[str, float]) -> str:
    rows = []
    for run in runs:
        for counted in COUNTS:
            bits, values = _at_run(run, counted, metric, curves, headers)
            digits = (_digits(metric, value) for value in (run.summary[metric], *values.values()))
            rows.append((f"`{run.name}`", counted, f"{bits:.3f}", *digits))
    return _measure.table(("run", "bits counted by", "bits per pixel", "the run", *curves), rows)


def _verdicts(runs: Sequence[Run], metric: str, curves: Curves, headers: dict[str, float]) -> Iterator[str]:
    for run in runs:
        for counted in COUNTS:
            yield f"- {verdict(run, counted, metric, curves, headers)}"


def draw(path: Path, runs: Sequence[Run], curves: Curves) -> None:
    """Writes a PNG with a panel a metric: the codecs' curves, and two points a run."""
    shown = [metric for metric in METRICS if metric in runs[0].summary]
    figure = Figure(figsize=(5.5 * len(shown), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, curve in curves.items():
            axis.plot(curve["bits_per_pixel"], curve[metric], label=name, linewidth=1.5)
        for number, run in enumerate(runs):
            spent, ideal = (run.summary[rate] for rate in ("bits_per_pixel", "bits_per_pixel_entropy"))
            colour, value = f"C{len(curves) + number}", run.summary[metric]
            axis.plot([ideal, spent], [value, value], color=colour, linewidth=0.8)
            axis.plot(spent, value, "o", color=colour, label=f"{run.name}, log2 K a code")
            axis.plot(ideal, value, "o", color=colour, mfc="white", label=f"{run.name}, by entropy")
        axis.set(xscale="log", xlim=_DRAWN_RATES, xlabel="bits per pixel", ylabel=METRICS[metric][0])
        axis.set_xticks(_TICKS)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=_DPI)


def main() -> None:
    """Parses the flags, measures runs and codecs, writes the picture and the table."""
    flags = _measure.parser(__doc__)
    flags.add_argument("--runs", type=Path, nargs="+", required=True, help="folders that scripts/train.py wrote")
    flags.add_argument("--data", help="other files than the runs' own, as scripts/train.py takes them")
    flags.add_argument("--out", type=Path, required=True, help="folder for the picture and the table")
    flags.add_argument("--vgg-weights", help="trained VGG16, for the perceptual distance; as scripts/train.py takes it")
    flags.add_argument("--avif-speed", type=int, choices=range(11), default=6, help="lower: slower, better AVIF")
    flags = flags.parse_args()
    codecs = _image_codecs.codecs(flags.avif_speed)
    out = _measure.output_folder(flags.out)
    if flags.vgg_weights == vgg_weights.RANDOM:
        raise ConfigError("--vgg-weights random: an untrained VGG16 measures nothing; give a file, or leave it out")
    vgg_variables = vgg_weights.load(flags.vgg_weights, *_image_codecs.LAYERS) if flags.vgg_weights else None
    names = [path.resolve().name for path in flags.runs]
    names = names if len(set(names)) == len(names) else list(map(str, flags.runs))
    runs = [evaluate(run, name, flags.data, vgg_variables) for run, name in zip(flags.runs, names, strict=True)]
    check_same_slices(runs)
    curves = _image_codecs.curves(codecs, [sample.pixels for sample in runs[0].samples], vgg_variables)
    text = tables(runs, codecs, curves)
    draw(out / "rate_distortion.png", runs, curves)
    write_whole(out / "rate_distortion.md", text)
    print(f"\n{text}\nWritten: {out}/rate_distortion.png, {out}/rate_distortion.md")


if __name__ == "__main__":
    _measure.run(main)
