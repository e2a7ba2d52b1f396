"""The table of an evaluation: a row of metrics a slice, their means, and how the codes were used."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vqvae_jax import metrics
from vqvae_jax.config import Config
from vqvae_jax.data.loader import Sample
from vqvae_jax.evaluation.prior_figures import PriorFigures
from vqvae_jax.runtime.files import write_whole

METRICS = "metrics.json"


@dataclasses.dataclass(frozen=True)
class SliceMetrics:
    """Metrics of one slice in [0, 1] scale on its own grid of ``height`` x ``width`` pixels.

    NaN: ``hfen`` where the slice is of one value; ``perceptual`` without trained VGG16 weights, or where the slice
    is too small for them. ``empty``: the slice is of one value, so that there is nothing to reconstruct.
    """

    file: str
    case: str
    slice: int
    height: int
    width: int
    ssim: float
    psnr: float
    mae: float
    ms_ssim: float
    hfen: float
    empty: bool = False
    perceptual: float = math.nan


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
      rows: a row a slice, in the split's order.
      counts: float64 [K], how often each code was used.
      codes_per_slice: how many codes stand for one slice.
      reference: each slice's SSIM by the published project's protocol; empty if not asked for.
      kept: by index, the slices that were asked for, each with its reconstruction [H, W] in [0, 1] on its own grid.
      prior: what the run's prior says; None where there is none, or nobody asked.
    """

    rows: list[SliceMetrics]
    counts: np.ndarray
    codes_per_slice: int
    reference: list[float] = dataclasses.field(default_factory=list)
    kept: dict[int, tuple[Sample, np.ndarray]] = dataclasses.field(default_factory=dict)
    prior: PriorFigures | None = None

    def mean(self, name: str) -> float:
        """Mean of a metric over the slices."""
        return float(np.mean([getattr(row, name) for row in self.rows]))

    def without_empty(self) -> dict[str, float]:
        """How many slices are empty, and the means over the others; nothing where none is empty, or all are."""
        filled = dataclasses.replace(self, rows=[row for row in self.rows if not row.empty])
        if len(filled.rows) in (0, len(self.rows)):
            return {}
        means = {f"{name}_without_empty": filled.mean(name) for name in ("ssim", "psnr", "mae", "ms_ssim")}
        return {"empty_slices": len(self.rows) - len(filled.rows), **means}

    def mean_of_measured(self, name: str) -> float:
        """Mean of a metric over the slices that have it; NaN if none has."""
        values = [getattr(row, name) for row in self.rows]
        measured = [value for value in values if not math.isnan(value)]
        return float(np.mean(measured)) if measured else math.nan

    def order(self) -> list[int]:
        """Indices of the slices from the lowest SSIM to the highest."""
        return sorted(range(len(self.rows)), key=lambda index: self.rows[index].ssim)

    def summary(self) -> dict[str, float]:
        """Every scalar by name.

        ``bits_per_pixel`` spends log2 K bits a code, over the slices' own pixels. ``bits_per_pixel_entropy`` spends
        the entropy of the codes' frequencies in this split: an ideal entropy coder that knows them needs as much.
        ``perceptual`` is left out where no slice has it.
        """
        order = self.order()
        pixels = sum(row.height * row.width for row in self.rows)
        codes_per_pixel = self.codes_per_slice * len(self.rows) / pixels
        perceptual = self.mean_of_measured("perceptual")
        reference = {"ssim_reference_protocol": float(np.mean(self.reference))} if self.reference else {}
        return {
            "slices": len(self.rows),
            "ssim": self.mean("ssim"),
            "ssim_highest": self.rows[order[-1]].ssim,
            "ssim_lowest": self.rows[order[0]].ssim,
            "psnr": self.mean("psnr"),
            "mae": self.mean("mae"),
            "ms_ssim": self.mean("ms_ssim"),
            "hfen": self.mean_of_measured("hfen"),
            **({} if math.isnan(perceptual) else {"perceptual": perceptual}),
            "perplexity": float(metrics.perplexity(self.counts)),
            "codebook_usage": float(metrics.codebook_usage(self.counts)),
            "bits_per_pixel": codes_per_pixel * math.log2(len(self.counts)),
            "bits_per_pixel_entropy": codes_per_pixel * float(metrics.code_entropy(self.counts)),
            **self.without_empty(),
            **reference,
            **(self.prior.summary(codes_per_pixel) if self.prior else {}),
        }


def protocol(config: Config) -> str:
    """How the figures were measured, for people."""
    low, high = config.data.scale_percentiles
    return (
        "Each slice on its own grid, scaled to [0, 1] between percentiles "
        f"{low:g} and {high:g} of its file. SSIM by scikit-image's definition (7x7 uniform window, data_range 1); "
        "MS-SSIM with the same window"
    )


def describe(evaluation: Evaluation, config: Config) -> Iterator[str]:
    """Lines for people."""
    summary = evaluation.summary()
    yield f"Average SSIM: {summary['ssim']:.4f}"
    yield f"Highest SSIM: {summary['ssim_highest']:.4f}, lowest SSIM: {summary['ssim_lowest']:.4f}"
    yield f"MS-SSIM: {summary['ms_ssim']:.4f}, PSNR: {summary['psnr']:.2f} dB, MAE: {summary['mae']:.4f}"
    perceptual = f", perceptual distance: {summary['perceptual']:.4f}" if "perceptual" in summary else ""
    yield f"High-frequency error norm: {summary['hfen']:.4f}{perceptual}"
    yield (
        f"Perplexity: {summary['perplexity']:.1f} of {len(evaluation.counts)} codes, "
        f"codes used: {summary['codebook_usage']:.1%}, bits per pixel: {summary['bits_per_pixel']:.4f}, "
        f"by the codes' entropy: {summary['bits_per_pixel_entropy']:.4f}"
    )
    yield f"{summary['slices']} slices. {protocol(config)}."
    if "empty_slices" in summary:
        yield (
            f"Without {summary['empty_slices']} empty slices: SSIM {summary['ssim_without_empty']:.4f}, MS-SSIM "
            f"{summary['ms_ssim_without_empty']:.4f}, PSNR {summary['psnr_without_empty']:.2f} dB"
        )
    if evaluation.prior:
        yield from evaluation.prior.describe(summary)
    if "ssim_reference_protocol" in summary:
        yield (
            f"SSIM by the reference protocol: {summary['ssim_reference_protocol']:.4f} (z-scored, clipped to [0, 1], "
            "256 x 256; a poor measure, to compare with the published 0.4776 alone)"
        )


def data_of(folder: Path) -> str | None:
    """The data set whose results lie in a folder; None where there are none."""
    try:
        return json.loads((folder / METRICS).read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        return None


def write(evaluation: Evaluation, folder: Path, config: Config) -> None:
    """Writes metrics.json and per_slice.csv, and what the prior says."""
    summary = {name: value if math.isfinite(value) else None for name, value in evaluation.summary().items()}
    about = {"data": config.data.data, "protocol": protocol(config)}
    write_whole(folder / METRICS, json.dumps(summary | about, indent=2) + "\n")
    rows = [dataclasses.asdict(row) for row in evaluation.rows]
    for row, ssim in zip(rows, evaluation.reference, strict=False):
        row["ssim_reference_protocol"] = ssim
    if evaluation.prior:
        for row, bits in zip(rows, evaluation.prior.bits, strict=True):
            row["prior_bits_per_code"] = float(bits.mean())
        evaluation.prior.write(folder)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_whole(folder / "per_slice.csv", text.getvalue())
