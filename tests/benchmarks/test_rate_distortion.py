"""Runs beside image codecs: bytes of whole files, metrics, rates between settings, BD-rates."""

import io
import json

import numpy as np
import pytest
from benchmark_runs import run_benchmark, start_benchmark
from PIL import Image
from scipy.stats import logistic, norm
from skimage.metrics import structural_similarity


def smooth_images(count=3, shape=(64, 32)):
    """Images in [0, 1] that compress: a few waves each."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    images = [0.5 + 0.3 * np.sin(x / (3 + i)) * np.cos(y / 5) + 0.1 * np.sin(x * y / 40) for i in range(count)]
    return [image.astype(np.float32) for image in images]


def curves_of(image_codecs, codecs, images, folder):
    return image_codecs.curves(codecs, [np.stack(images)], lambda line: None, folder / "codecs.json")


def test_a_codecs_rate_is_its_whole_files_and_its_ssim_scikit_images(benchmark_module, tmp_path):
    image_codecs, images = benchmark_module("_image_codecs"), smooth_images()
    webp = image_codecs.codecs([10])[2]
    curve = curves_of(image_codecs, [webp], images, tmp_path)["WebP"]
    bits, ssim = 0, []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(file, "WEBP", quality=75, method=6)
        bits += 8 * file.getbuffer().nbytes
        decoded = np.asarray(Image.open(file).convert("L")) / 255
        ssim.append(structural_similarity(decoded, image.astype(np.float64), data_range=1))
    assert curve["bits_per_pixel"][-1] == pytest.approx(bits / sum(image.size for image in images))
    assert curve["ssim"][-1] == pytest.approx(np.mean(ssim), abs=1e-4)


@pytest.mark.slow
def test_every_codec_spends_more_bits_for_more_ssim_and_is_measured_once(benchmark_module, tmp_path):
    image_codecs, lines = benchmark_module("_image_codecs"), []
    codecs, volume = image_codecs.codecs([10]), [np.stack(smooth_images())]
    found = image_codecs.curves(codecs, volume, lines.append, tmp_path / "codecs.json")
    assert len(lines) == sum(len(codec.sweep) for codec in codecs)
    for name, curve in found.items():
        assert len(curve["ssim"]) >= 3, name
        assert curve["ssim"][-1] > 0.9, name
    again = image_codecs.curves(codecs, volume, lines.append, tmp_path / "codecs.json")
    assert len(lines) == sum(len(codec.sweep) for codec in codecs)
    np.testing.assert_array_equal(found["WebP"]["psnr"], again["WebP"]["psnr"])


def test_an_avif_sequence_is_one_file_and_its_payload_what_its_mdat_box_holds(benchmark_module):
    image_codecs = benchmark_module("_image_codecs")
    *_, still, sequence = image_codecs.codecs([10])
    moving = [np.roll(smooth_images(1, (64, 64))[0], number, axis=1) for number in range(5)]
    levels = np.round(np.stack(moving) * 255).astype(np.uint8)
    file = sequence.encode(levels, sequence.sweep[-1])
    assert image_codecs.decode(file).shape == levels.shape
    assert np.abs(image_codecs.decode(file).astype(int) - levels).mean() < 10
    assert image_codecs.payload(file) == len(file) - file.index(b"mdat") - 4  # the last box
    alone = [still.encode(level[None], still.sweep[-1]) for level in levels]
    assert len(file) < sum(map(len, alone))
    assert all(0 < image_codecs.payload(each) < len(each) for each in alone)


def test_what_lies_between_two_settings_is_interpolated_and_nothing_beyond_is_made_up(benchmark_module):
    image_codecs = benchmark_module("_image_codecs")
    rate_for, value_at = image_codecs.rate_for, image_codecs.value_at
    rates = np.array([0.25, 0.5, 1.0, 2.0])
    curve = {"bits_per_pixel": rates, "psnr": 30 + 6 * np.log2(rates)}
    assert rate_for(curve, "psnr", 24) == pytest.approx(0.5)
    assert rate_for(curve, "psnr", 27) == pytest.approx(2**-0.5, abs=0.02)
    assert np.isnan([rate_for(curve, "psnr", beyond) for beyond in (17.0, 37.0)]).all()
    assert value_at(curve, "psnr", 0.7) == pytest.approx(30 + 6 * np.log2(0.7), abs=0.02)
    assert np.isnan([value_at(curve, "psnr", beyond) for beyond in (0.24, 2.1)]).all()


def test_bd_rate_of_a_curve_that_takes_a_fifth_fewer_bits_is_minus_20_per_cent(benchmark_module):
    bd_rate = benchmark_module("rate_distortion").bd_rate
    rates = np.array([0.1, 0.2, 0.4, 0.8])
    anchor = {"bits_per_pixel": rates, "psnr": 30 + 6 * np.log2(rates)}
    assert bd_rate(anchor, anchor | {"bits_per_pixel": 0.8 * rates}, "psnr") == pytest.approx(-20)
    assert np.isnan(bd_rate(anchor, anchor | {"psnr": anchor["psnr"] + 50}, "psnr"))


@pytest.mark.slow
def test_rate_distortion(tiny_run, tmp_path):
    place, _ = tiny_run
    flags = ("--runs", "runs/tiny", "--out", tmp_path, "--avif-speeds", 10, "--effort", 0)
    rows = run_benchmark("rate_distortion.py", *flags, cwd=place)
    names = ("rate_distortion.png", "rate_distortion.md", "rate_distortion.log", "codecs.json")
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    evaluated = json.loads((place / "runs/tiny/eval/test/metrics.json").read_text())
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[4] == f"{evaluated['ssim']:.4f}"
    assert float(cells[3]) > evaluated["bits_per_pixel_entropy"]  # whole files, with headers
    log = (tmp_path / "rate_distortion.log").read_text()
    assert "tiny, effort 0" in log and "AVIF sequence speed 10, 55" in log


def test_rate_distortion_names_what_is_no_run(tmp_path):
    done = start_benchmark("rate_distortion.py", "--runs", tmp_path / "none", "--out", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "none/config.json" in done.stderr


@pytest.mark.slow
def test_the_hyperpriors_bits_are_scipys(benchmark_module):
    torch = pytest.importorskip("torch")
    hyperprior = benchmark_module("hyperprior")
    model = hyperprior.MeanScaleHyperprior().eval()
    images = torch.rand(2, 1, 64, 128)
    made, bits = model(images)
    assert made.shape == images.shape and bits.shape == (2,) and (bits > 0).all()
    latents = model.analysis(images)
    mean, width = model.hyper_synthesis(torch.round(model.hyper_analysis(latents))).chunk(2, 1)
    rounded = (torch.round(latents - mean) + mean).detach().numpy().astype(float)
    mean, width = mean.detach().numpy().astype(float), torch.nn.functional.softplus(width).clamp_min(0.11)
    width = width.detach().numpy().astype(float)

    own = norm.cdf(rounded + 0.5, mean, width) - norm.cdf(rounded - 0.5, mean, width)
    hyper = torch.round(model.hyper_analysis(latents)).detach().numpy()
    others = logistic.cdf(hyper + 0.5) - logistic.cdf(hyper - 0.5)
    expected = -np.log2(np.maximum(own, 1e-9)).sum((1, 2, 3)) - np.log2(others).sum((1, 2, 3))
    np.testing.assert_allclose(bits.detach().numpy(), expected, rtol=1e-3)
