"""Each benchmark runs, at a tiny size, and prints its table; how fast anything is, is not tested."""

import importlib
import io
import json
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from skimage.metrics import structural_similarity

from vqvae_jax.errors import ConfigError

SMALL_MODEL = ("--image-size", 32, 16, "--hidden-channels", 8, "--rounds", 1, "--steps", 1)


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a file of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def start_benchmark(name, *arguments, cwd=None):
    """Runs benchmarks/NAME as a user would."""
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *map(str, arguments)],
        cwd=cwd,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_benchmark(name, *arguments, cwd=None):
    """Lines of the table that a benchmark prints, without its two of header."""
    done = start_benchmark(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert "nan" not in "".join(rows)
    return rows


@pytest.mark.slow
def test_train_step():
    pytest.importorskip("torch")
    rows = run_benchmark("train_step.py", *SMALL_MODEL, "--batch-size", 2, "--matrix", 64)
    assert [row.split()[1] for row in rows] == ["jax", "torch"]


def test_inference():
    pytest.importorskip("torch")
    rows = run_benchmark("inference.py", *SMALL_MODEL, "--batch-sizes", 1, 2)
    assert [row.split()[1] for row in rows] == ["encode"] * 2 + ["decode"] * 2 + ["reconstruct"] * 2


def test_input_pipeline():
    rows = run_benchmark("input_pipeline.py", "--files", 40, "--image-size", 32, 16, "--rounds", 1)
    assert len(rows) == 5


def test_attention():
    rows = run_benchmark("attention.py", "--rounds", 1, "--steps", 1, "--batch-size", 1, "--image-sizes", "64x32")
    assert [row.split()[3] for row in rows] == ["blocks", "plain"]


@pytest.mark.slow
def test_startup():
    rows = run_benchmark("startup.py", "--preset", "demo", "--rounds", 1, "--batch-size", 1)
    assert len(rows) == 5


@pytest.mark.slow
def test_scaling():
    rows = run_benchmark("scaling.py", "--rounds", 1, "--batch-size", 4, "--vary", "devices", "--steps", 0)
    assert len(rows) == 3


def smooth_images(count=3, shape=(64, 32)):
    """Images in [0, 1] that compress: a few waves each."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    images = [0.5 + 0.3 * np.sin(x / (3 + i)) * np.cos(y / 5) + 0.1 * np.sin(x * y / 40) for i in range(count)]
    return [image.astype(np.float32) for image in images]


def test_a_codecs_rate_is_its_whole_files_and_its_ssim_scikit_images(benchmark_module):
    image_codecs, images = benchmark_module("_image_codecs"), smooth_images()
    webp = image_codecs.codecs(avif_speed=10)[2]
    curve = image_codecs.curves([webp], images)["WebP"]
    bits, ssim = 0, []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(np.round(image * 255).astype(np.uint8)).save(file, "WEBP", quality=90, method=6)
        bits += 8 * file.getbuffer().nbytes
        decoded = np.asarray(Image.open(file).convert("L")) / 255
        ssim.append(structural_similarity(decoded, image.astype(np.float64), data_range=1))
    assert curve["bits_per_pixel"][-1] == pytest.approx(bits / sum(image.size for image in images))
    assert curve["ssim"][-1] == pytest.approx(np.mean(ssim), abs=1e-4)


def test_every_codec_spends_more_bits_for_more_ssim(benchmark_module):
    image_codecs = benchmark_module("_image_codecs")
    for name, curve in image_codecs.curves(image_codecs.codecs(avif_speed=10), smooth_images()).items():
        assert curve["bits_per_pixel"][0] < curve["bits_per_pixel"][-1], name
        assert curve["ssim"][0] < curve["ssim"][-1], name
        assert curve["ssim"][-1] > 0.9, name


def test_a_rate_between_two_settings_is_interpolated_and_none_beyond_is_made_up(benchmark_module):
    at_rate = benchmark_module("_image_codecs").at_rate
    rates = np.array([0.25, 0.5, 1.0, 2.0])
    curve = {"bits_per_pixel": rates, "psnr": 30 + 6 * np.log2(rates)}
    assert at_rate(curve, 0.5, "psnr") == pytest.approx(24)
    assert at_rate(curve, 2**-0.5, "psnr") == pytest.approx(27, abs=0.2)
    assert np.isnan([at_rate(curve, beyond, "psnr") for beyond in (0.2, 2.1)]).all()


def test_rate_distortion(tiny_run, tmp_path):
    place, _ = tiny_run
    rows = run_benchmark("rate_distortion.py", "--runs", "runs/tiny", "--out", tmp_path, "--avif-speed", 10, cwd=place)
    assert {path.name for path in tmp_path.iterdir()} == {"rate_distortion.png", "rate_distortion.md"}
    evaluated = json.loads((place / "runs/tiny/eval/test/metrics.json").read_text())
    first = [cell.strip() for cell in rows[0].split("|")]
    assert first[3:5] == [f"{evaluated['bits_per_pixel']:.3f}", f"{evaluated['ssim']:.4f}"]
    text = (tmp_path / "rate_distortion.md").read_text()
    sentences = [line for line in text.splitlines() if line.startswith("- SSIM")]
    assert len(sentences) == 3
    for sentence, row in zip(sentences, rows, strict=False):
        names = ("`tiny`", "JPEG", "JPEG 2000", "WebP", "AVIF")
        values = [cell.strip() for cell in row.split("|")[4:9]]
        best = max((float(value), name) for value, name in zip(values, names, strict=True) if value != "-")[1]
        assert f"**{best} wins**" in sentence


def test_a_codec_gets_its_header_free_where_none_is_counted(benchmark_module):
    rate_distortion = benchmark_module("rate_distortion")
    run = rate_distortion.Run("ours", {"bits_per_pixel": 0.5, "bits_per_pixel_entropy": 0.4, "psnr": 27.5}, [])
    rates = np.geomspace(0.25, 2, 40)
    curves = {"WebP": {"bits_per_pixel": rates, "psnr": 28 + 6 * np.log2(rates / 0.5)}}
    found = {
        counted: rate_distortion.verdict(run, counted, "psnr", curves, {"WebP": 0.5})
        for counted in rate_distortion.COUNTS
    }
    assert "at 0.500 bits a pixel (log2 K a code): **WebP wins**. WebP (28.00)" in found["log2 K a code"]
    assert "**`ours` wins**" in found["the codes' entropy"]
    assert "**WebP wins**. WebP (34.00)" in found["log2 K a code, no codec's header"]


def test_rate_distortion_names_what_is_no_run(tmp_path):
    done = start_benchmark("rate_distortion.py", "--runs", tmp_path / "none", "--out", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "none/config.json" in done.stderr


SMALL_RECIPE = (
    *("--image-size", 32, 16, "--hidden-channels", 8, "--embedding-dim", 4, "--num-embeddings", 8),
    *("--steps", 1, "--batch-size", 2, "--perceptual-weight", 0),
)


@pytest.mark.slow
def test_published(tiny_run, tmp_path):
    pytest.importorskip("torch")
    place, _ = tiny_run
    phantom = next((place / "data/phantom").iterdir())
    arguments = ("--data", phantom, "--out", tmp_path, "--seeds", 0, 1, "--picture", "runs/tiny")
    rows = run_benchmark("published.py", *SMALL_RECIPE, *arguments, cwd=place)
    scores = np.array([[float(cell) for cell in row.split("|")[4:7]] for row in rows])
    np.testing.assert_allclose(scores[2], scores[:2].mean(0), atol=1e-4)
    written = {"seed-0.pth", "seed-0.png", "seed-1.pth", "seed-1.png", "beside.png"}
    assert {path.name for path in tmp_path.iterdir()} == written


class Unchanged:
    """Gives back what it is given, as no model does."""

    def __call__(self, images):
        return images, None, None


class SliceList:
    """Slices by their intensities alone; their range is that of the whole."""

    image_shape = (32, 16, 1)

    def __init__(self, intensities, sample):
        self._intensities, self._sample = intensities, sample

    def __len__(self):
        return len(self._intensities)

    def intensities(self, index):
        return self._intensities[index]

    def sample(self, index):
        raw = self._intensities[index]
        low, high = np.percentile(raw, (1, 99))
        pixels = np.clip((raw - low) / (high - low), 0, 1).astype(np.float32)
        return self._sample(pixels, "file", "case", 0, (low, high), np.eye(4))


def test_a_model_that_changes_nothing_scores_1(benchmark_module):
    pytest.importorskip("torch")
    from vqvae_jax.data import loader  # noqa: PLC0415

    rng = np.random.default_rng(0)
    raw = [rng.gamma(2, 100, (32, 16)).astype(np.float32) for _ in range(3)]
    published = benchmark_module("published")
    scores = published.score(Unchanged(), SliceList(raw, loader.Sample))
    for name in (published.PROTOCOL, published.INTENSITIES):
        np.testing.assert_allclose(scores.ssim[name], 1, atol=1e-5)
    assert (scores.ssim[published.IMAGES] < 0.5).all()  # intensities are no image in [0, 1]
    z = (raw[0] - raw[0].mean()) / raw[0].std()
    assert scores.originals[0].mean() == pytest.approx(z.clip(0, 1).mean(), abs=0.15)


@pytest.fixture
def three_patients(tmp_path):
    """A data set with two training patients and one in the other two splits; each slice's corner has its patient."""
    rng = np.random.default_rng(0)
    for split, case in (("train", 1), ("train", 2), ("validate", 3), ("test", 3)):
        path = tmp_path / "data" / f"keras_slices_{split}" / f"case_{case:03}_week_{len(split)}_slice_0.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 1000, (32, 16)).astype(np.int16)
        pixels[:4, :4] = case
        nibabel.save(nibabel.Nifti1Image(pixels, np.diag([2.0, 3, 4, 1])), path)
    return tmp_path / "data"


def copied(folder):
    """(split's folder, patient) of every slice."""
    return sorted((path.parent.name, round(float(nibabel.load(path).dataobj[0, 0]))) for path in folder.glob("*/*"))


def test_slices_are_shrunk(benchmark_module, three_patients, tmp_path):
    benchmark_module("ablation").copy_slices(three_patients, tmp_path / "small", 2)
    assert copied(tmp_path / "small") == copied(three_patients)
    for path in tmp_path.glob("small/*/*"):
        image = nibabel.load(path)
        original = nibabel.load(three_patients / path.parent.name / path.name.removeprefix(f"{path.parent.name}_"))
        assert image.shape == (16, 8)
        np.testing.assert_array_equal(image.affine, np.diag([4.0, 6, 4, 1]))
        means = original.get_fdata().reshape(16, 2, 8, 2).mean(axis=(1, 3))
        assert np.corrcoef(image.get_fdata().ravel(), means.ravel())[0, 1] > 0.9


def test_another_patient_is_tested_on(benchmark_module, three_patients, tmp_path):
    """The others' test slices are trained on; validation stays as it is."""
    ablation, turned = benchmark_module("ablation"), tmp_path / "turned"
    ablation.copy_slices(three_patients, turned, 1, "case_002")
    train, validation, test = "keras_slices_train", "keras_slices_validate", "keras_slices_test"
    assert copied(turned) == sorted([(train, 1), (test, 2), (validation, 3), (train, 3)])
    for path in turned.glob("*/*"):
        original = nibabel.load(three_patients / path.name.replace("_case", "/case", 1))
        np.testing.assert_array_equal(nibabel.load(path).get_fdata(), original.get_fdata())
    for case, words in (
        ("case_003", "leaves no slices for validation"),
        ("case_009", "only case_001, case_002, case_003"),
    ):
        with pytest.raises(ConfigError, match=f"--test-case {case}: .*{words}"):
            ablation.copy_slices(three_patients, tmp_path / "none", 1, case)
    assert not (tmp_path / "none").exists()


def test_runs_of_another_table_are_not_taken_for_this_ones(three_patients, tmp_path):
    """Refused before anything is trained, in one line that says what differs."""

    def run(*flags):
        where = ("--data", three_patients, "--out", tmp_path / "out", "--only", "no such row")
        return start_benchmark("ablation.py", *where, *flags)

    first = run("--shrink", "2", "--", "--epochs", "1")
    assert first.returncode == 0, first.stderr
    assert "shrunk by 2" in first.stdout
    assert {nibabel.load(path).shape for path in tmp_path.glob("out/slices/*/*")} == {(16, 8)}
    assert run("--shrink", "2", "--", "--epochs", "1").returncode == 0
    for flags, words in (
        (["--", "--epochs", "1"], "shrink 2, not 1"),
        (["--shrink", "2", "--test-case", "case_001", "--", "--epochs", "1"], "test_case None, not 'case_001'"),
        (["--shrink", "2", "--", "--epochs", "2"], "flags ['--epochs', '1'], not ['--epochs', '2']"),
    ):
        again = run(*flags)
        assert again.returncode != 0
        assert words in again.stderr.splitlines()[-1]
