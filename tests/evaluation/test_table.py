"""The table of an evaluation: means, what codes cost, and what is written of them."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from vqvae_jax.config import Config, DataConfig
from vqvae_jax.evaluation import table
from vqvae_jax.evaluation.table import Evaluation, SliceMetrics

ROW = SliceMetrics("a.nii", "c", 0, 4, 4, ssim=0.5, psnr=20, mae=0.1, ms_ssim=0.75, hfen=0.25)
BETTER = dataclasses.replace(ROW, file="b.nii", slice=1, ssim=0.7, psnr=24, mae=0.05, ms_ssim=0.85, hfen=0.15)
EVEN = np.ones(4)


def test_a_slice_of_one_value_leaves_the_mean_error_norm_of_the_others():
    flat = dataclasses.replace(ROW, hfen=float("nan"))
    assert Evaluation([ROW, flat], EVEN, 4).summary()["hfen"] == ROW.hfen
    assert np.isnan(Evaluation([flat], EVEN, 4).summary()["hfen"])
    broken = dataclasses.replace(ROW, ssim=float("nan"))
    assert np.isnan(Evaluation([ROW, broken], EVEN, 4).summary()["ssim"])


def test_bits_of_codes_that_are_not_used_alike():
    """By hand: 4 of 8 codes, used 4, 2, 1 and 1 times in 8, have an entropy of 1/2 + 2/4 + 2 * 3/8 = 1.75 bits."""
    found = Evaluation([ROW, ROW], np.array([4, 2, 0, 0, 1, 1, 0, 0]), 4)
    summary = found.summary()
    assert summary["bits_per_pixel"] == 4 * 3 / 16
    assert summary["bits_per_pixel_entropy"] == pytest.approx(4 * 1.75 / 16)
    assert summary["perplexity"] == pytest.approx(2**1.75)
    assert summary["codebook_usage"] == 0.5
    said = "\n".join(table.describe(found, Config()))
    assert "Perplexity: 3.4 of 8 codes, codes used: 50.0%, bits per pixel: 0.7500, " in said
    assert "by the codes' entropy: 0.4375" in said


def test_slices_count_alike_and_are_ordered_by_ssim():
    found = Evaluation([BETTER, ROW], EVEN, 4)
    assert found.order() == [1, 0]
    summary = found.summary()
    assert summary["slices"] == 2
    assert (summary["ssim_lowest"], summary["ssim_highest"]) == (0.5, 0.7)
    means = {"ssim": 0.6, "psnr": 22, "mae": 0.075, "ms_ssim": 0.8, "hfen": 0.2}
    assert {name: summary[name] for name in means} == pytest.approx(means)
    said = "\n".join(table.describe(found, Config()))
    assert "Average SSIM: 0.6000\nHighest SSIM: 0.7000, lowest SSIM: 0.5000" in said
    assert "PSNR: 22.00 dB, MAE: 0.0750" in said and "2 slices. " in said
    assert "reference protocol" not in said


def test_how_figures_were_measured_is_said():
    config = Config(data=DataConfig(scale_percentiles=(1, 99)))
    text = table.protocol(config)
    assert "between percentiles 1 and 99" in text and "data_range 1" in text
    assert text in "\n".join(table.describe(Evaluation([ROW], EVEN, 4), config))


def test_what_is_written_is_what_was_found(tmp_path):
    flat = dataclasses.replace(BETTER, hfen=float("nan"))
    found = Evaluation([flat, flat], EVEN, 4, reference=[0.1, 0.3])
    table.write(found, tmp_path / "new", Config(data=DataConfig(data="slices.zip")))
    written = json.loads((tmp_path / "new/metrics.json").read_text())
    assert written.pop("protocol") == table.protocol(Config())
    assert written.pop("data") == "slices.zip"
    assert written["ssim_reference_protocol"] == pytest.approx(0.2)
    assert written == {name: None if np.isnan(value) else value for name, value in found.summary().items()}
    assert written["hfen"] is None
    with (tmp_path / "new/per_slice.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ssim_reference_protocol"]) for row in rows] == [0.1, 0.3]
    for row in rows:
        for name, value in dataclasses.asdict(flat).items():
            assert row[name] == str(value)


def test_empty_slices_are_counted_apart():
    """Of one value, so that there is nothing to reconstruct: the means are given with and without them."""
    empty = dataclasses.replace(ROW, ssim=1, psnr=80, mae=0, ms_ssim=1, empty=True)
    summary = Evaluation([ROW, empty, ROW, empty], EVEN, 4).summary()
    assert summary["ssim"] == 0.75 and summary["psnr"] == 50
    assert summary["empty_slices"] == 2
    for name in ("ssim", "psnr", "mae", "ms_ssim"):
        assert summary[f"{name}_without_empty"] == pytest.approx(getattr(ROW, name))
    said = "\n".join(table.describe(Evaluation([ROW, empty], EVEN, 4), Config()))
    assert "Without 1 empty slices: SSIM 0.5000" in said
    for rows in ([ROW], [empty]):
        assert not [name for name in Evaluation(rows, EVEN, 4).summary() if "empty" in name]
