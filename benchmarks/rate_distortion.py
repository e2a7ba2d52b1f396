"""SSIM and PSNR against bits per pixel, by whole files: trained runs beside JPEG, JPEG 2000, WebP, JPEG XL and AVIF.

    python benchmarks/rate_distortion.py --runs runs/A [runs/B ...] --out runs/rate [--effort 2] [--slices 100]

A run's files are .vqz, one for each case and series. Runs that differ in their rate weight are points of one curve.
All see the same slices in [0, 1], each on its own grid; the codecs get them rounded to 8 bits. Writes
rate_distortion.png, rate_distortion.md, a log, and codecs.json, so that no codec measures the same slices again.
"""

import dataclasses
import datetime
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _image_codecs
import _measure
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

import vqvae_jax
from vqvae_jax import metrics
from vqvae_jax.coding import vqz
from vqvae_jax.errors import ConfigError
from vqvae_jax.inference.beside_avif import file_of, open_volumes
from vqvae_jax.runtime.files import write_whole

LABELS = {"ssim": "SSIM", "psnr": "PSNR, dB"}
DIGITS = {"ssim": 4, "psnr": 2}
_PROTOCOL = (
    "Bits are those of whole files over all pixels: a .vqz file for each case and series, a file for each slice by a "
    "codec, and for each case and series by a sequence. Without a header, an AVIF file counts as the contents of its "
    "`mdat` box. Every metric is taken on the slice's own grid against the original in [0, 1] and averaged over the "
    "slices; SSIM by scikit-image's definition (7x7 uniform window, data_range 1). The codecs get 8 bits. BD-rate "
    "(Bjontegaard 2001, with monotone cubics) is over the metric's values that both curves reach; below 0, the runs "
    "take fewer bits."
)
_TICKS = (0.03, 0.06, 0.125, 0.25, 0.5, 1, 2)
_DPI = 110


@dataclasses.dataclass(frozen=True)
class Point:
    """One run at one effort: mean bits a pixel of its files, SSIM, PSNR in dB, and seconds a slice to encode."""

    name: str
    bits_per_pixel: float
    ssim: float
    psnr: float
    seconds: float


def measure(run_dir: Path, name: str, effort: int, images: Sequence[np.ndarray]) -> Point:
    """What a run's files of volumes cost and show."""
    model = vqvae_jax.load(run_dir)
    size = pixels = 0
    seconds, values = 0.0, {metric: [] for metric in LABELS}
    model.encode(images[0], intensity_range=(0, 1), volume=True, effort=effort)  # compiles
    for volume in images:
        began = time.perf_counter()
        encoded = model.encode(volume, intensity_range=(0, 1), volume=True, effort=effort)
        content = vqz.to_bytes(file_of(encoded.indices, volume.shape[1:], model), model.prior)
        seconds += time.perf_counter() - began
        size, pixels = size + len(content), pixels + volume.size
        found = metrics.measure(np.clip(model.decode(encoded), 0, 1), volume)
        for metric, each in values.items():
            each.extend(found[metric].tolist())
    means = {metric: float(np.mean(each)) for metric, each in values.items()}
    return Point(name, 8 * size / pixels, **means, seconds=seconds / sum(map(len, images)))


def curve_of(points: Sequence[Point]) -> _image_codecs.Curve:
    """Points by rising rate."""
    order = sorted(points, key=lambda point: point.bits_per_pixel)
    return {name: np.array([getattr(point, name) for point in order]) for name in ("bits_per_pixel", *LABELS)}


def bd_rate(anchor: _image_codecs.Curve, test: _image_codecs.Curve, metric: str) -> float:
    """Per cent of bits that ``test`` takes more than ``anchor`` at the same metric; NaN where they do not overlap."""
    curves = (*_image_codecs.rising(anchor, metric), *_image_codecs.rising(test, metric))
    ours, theirs = curves[3], curves[1]
    if min(len(ours), len(theirs)) < 2 or max(ours[0], theirs[0]) >= min(ours[-1], theirs[-1]):
        return float("nan")
    import bjontegaard  # noqa: PLC0415 - `main` has looked whether it is there

    return float(bjontegaard.bd_rate(*curves, method="pchip", require_matching_points=False, min_overlap=0))


def _shown(value: float, form: str, unit: str = "") -> str:
    """A table's cell; a dash where nothing was measured."""
    return "-" if np.isnan(value) else f"{value:{form}}{unit}"


def tables(images: Sequence[np.ndarray], points: dict[int, list[Point]], curves: dict[str, _image_codecs.Curve]) -> str:
    """The Markdown file: how it was measured, the runs, and what each codec takes beside them."""
    count = sum(map(len, images))
    blocks = ["# Rate and distortion", f"{count} slices of {len(images)} volumes. {_PROTOCOL}"]
    rows = [
        (f"`{p.name}`", effort, f"{p.bits_per_pixel:.4f}", f"{p.ssim:.4f}", f"{p.psnr:.2f}", f"{p.seconds:.2f}")
        for effort, some in points.items()
        for p in some
    ]
    blocks += ["## Runs", _measure.table(("run", "effort", "bits a pixel", "SSIM", "PSNR, dB", "s a slice"), rows)]
    rows = []
    for effort, some in points.items():
        ours = curve_of(some)
        for codec, curve in curves.items():
            found = [bd_rate(curve, ours, metric) for metric in LABELS]
            rows.append((effort, codec, *(_shown(value, "+.1f", " %") for value in found)))
    header = ("effort", "codec", *(f"BD-rate, {metric.upper()}" for metric in LABELS))
    blocks += ["## The runs' curve against each codec's", _measure.table(header, rows)]
    rows = []
    for effort, some in points.items():
        for point in some:
            for codec, curve in curves.items():
                bits, cells = point.bits_per_pixel, []
                for metric, digits in DIGITS.items():
                    value = getattr(point, metric)
                    cells.append(_shown(bits / _image_codecs.rate_for(curve, metric, value), ".2f"))
                    cells.append(_shown(value - _image_codecs.value_at(curve, metric, bits), f"+.{digits}f"))
                rows.append((f"`{point.name}`", effort, codec, *cells))
    header = ["run", "effort", "codec"]
    for metric, label in LABELS.items():
        header += [f"times the codec's bits at its {metric.upper()}", f"{label} above the codec's at its bits"]
    blocks += ["## Each run against each codec", _measure.table(header, rows)]
    blocks.append(f"{datetime.date.today()}; {_measure.machine()}.")
    return "\n\n".join(blocks) + "\n"


def draw(path: Path, points: dict[int, list[Point]], curves: dict[str, _image_codecs.Curve]) -> None:
    """Writes a PNG with a panel a metric: a curve for each codec, and one for the runs at each effort."""
    figure = Figure(figsize=(5.5 * len(LABELS), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (metric, label) in zip(figure.subplots(1, len(LABELS)), LABELS.items(), strict=True):
        for name, curve in curves.items():
            axis.plot(curve["bits_per_pixel"], curve[metric], label=name, linewidth=1.2)
        for effort, some in points.items():
            curve = curve_of(some)
            axis.plot(*_image_codecs.rising(curve, metric), "k-")
            axis.plot(curve["bits_per_pixel"], curve[metric], "ko", mfc=str(effort / 4), label=f".vqz, effort {effort}")
        axis.set(xscale="log", xlabel="bits a pixel", ylabel=label)
        axis.set_xticks(_TICKS)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=_DPI)


def teller(log: Path) -> Callable[[str], None]:
    """A function that prints a line and adds it to a file."""

    def say(line: str) -> None:
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")

    return say


def main() -> None:
    """Parses the flags, measures runs and codecs, writes the picture and the tables."""
    flags = _measure.parser(__doc__)
    flags.add_argument("--runs", type=Path, nargs="+", required=True, help="folders that scripts/train.py wrote")
    flags.add_argument("--data", help="other files than the first run's own, as scripts/train.py takes them")
    flags.add_argument("--split", help="whose slices; by default test, and with --data all")
    flags.add_argument("--slices", type=int, help="a sample of whole volumes with about so many; by default all")
    flags.add_argument("--effort", type=int, nargs="+", choices=range(4), default=[2], help="as scripts/encode.py's")
    flags.add_argument("--avif-speeds", type=int, nargs="+", choices=range(11), default=[6, 2], help="lower is better")
    flags.add_argument("--out", type=Path, required=True, help="folder for the picture and the tables")
    flags = flags.parse_args()
    if importlib.util.find_spec("bjontegaard") is None:
        raise ConfigError("BD-rates need the package bjontegaard; run pip install -e .[benchmarks]")
    codecs = _image_codecs.codecs(flags.avif_speeds)
    out = _measure.output_folder(flags.out)
    say = teller(out / "rate_distortion.log")
    names = [path.resolve().name for path in flags.runs]
    names = names if len(set(names)) == len(names) else list(map(str, flags.runs))
    if flags.slices is not None and flags.slices < 1:
        raise ConfigError(f"--slices {flags.slices}: expected 1 or more")
    images = open_volumes(flags.runs[0], flags.split, data=flags.data, most=flags.slices)
    say(f"{sum(map(len, images))} slices of {len(images)} volumes")
    points: dict[int, list[Point]] = {effort: [] for effort in flags.effort}
    for run, name in zip(flags.runs, names, strict=True):
        for effort in flags.effort:
            found = measure(run, name, effort, images)
            points[effort].append(found)
            say(
                f"{name}, effort {effort}: {found.bits_per_pixel:.4f} bits a pixel, SSIM {found.ssim:.4f}, "
                f"{found.psnr:.2f} dB, {found.seconds:.2f} s a slice"
            )
    curves = _image_codecs.curves(codecs, images, say, out / "codecs.json")
    text = tables(images, points, curves)
    draw(out / "rate_distortion.png", points, curves)
    write_whole(out / "rate_distortion.md", text)
    print(f"\n{text}\nWritten: {out}/rate_distortion.png, {out}/rate_distortion.md")


if __name__ == "__main__":
    _measure.run(main)
