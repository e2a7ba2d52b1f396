"""What eval.py tells of a prior: the coder's bits, in their places, and samples beside the right slices."""

import csv
import json

import jax
import numpy as np
import pytest

import vqvae_jax
from vqvae_jax.coding import prior_coder
from vqvae_jax.evaluation import evaluate, html_report, prior_figures, table
from vqvae_jax.inference import prior_figures as measuring
from vqvae_jax.models.prior import Prior, init_prior
from vqvae_jax.models.prior_integers import PriorProgram, to_integers

PRIOR = Prior(num_embeddings=32, channels=8, blocks=1, neighbours=1, grid=(8, 4))

pytestmark = pytest.mark.usefixtures("compile_fast")


def quietly(line):
    del line


@pytest.fixture(scope="module")
def model(tiny_run, compile_fast):
    """The tiny run, with a prior that nobody trained."""
    found = vqvae_jax.load(tiny_run[0] / "runs/tiny")
    variables = init_prior(PRIOR, jax.random.normal(jax.random.key(0), (32, 5)), jax.random.key(1))
    found.__dict__["prior"] = PriorProgram(to_integers(PRIOR, jax.tree.map(lambda leaf: 3 * leaf, variables)))
    return found


@pytest.fixture
def evaluated(model, tiny_run, monkeypatch):
    """The tiny run's test split, evaluated with that prior and 20 samples."""
    monkeypatch.chdir(tiny_run[0])
    monkeypatch.setattr(measuring, "load", lambda *unused: model)
    monkeypatch.setattr(measuring, "COUNT", 20)
    return evaluate.evaluate_run(tiny_run[0] / "runs/tiny", measure_prior=measuring.measure, log=quietly)


def test_figures_are_printed_written_and_shown(evaluated, model, tiny_run):
    found, folder = evaluated.evaluation.prior, evaluated.folder
    slices = evaluate.open_run(tiny_run[0] / "runs/tiny", log=quietly)[2]
    indices = model.encode(np.stack([slices[i][..., 0] for i in range(len(slices))]), intensity_range=(0, 1)).indices
    first = [row.slice for row in evaluated.evaluation.rows].index(0)
    np.testing.assert_allclose(found.bits[first], prior_coder.bits(indices[first][None], model.prior)[0])
    assert found.bits.shape == indices.shape
    with (folder / "per_slice.csv").open() as file:
        rows = [float(row["prior_bits_per_code"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(rows, found.bits.mean(axis=(1, 2)))
    np.testing.assert_array_equal(np.load(folder / prior_figures.BITS), found.bits.astype(np.float32))
    written = json.loads((folder / "metrics.json").read_text())
    assert written["prior_bits_per_code"] == pytest.approx(np.mean(rows))
    ratio = written["bits_per_pixel"] / 5  # of 32 codes
    assert written["prior_bits_per_pixel"] == pytest.approx(ratio * np.mean(rows))
    assert written["samples_kernel_distance"] is None  # without trained VGG16 weights
    assert written["samples_count"] == 20
    assert (folder / prior_figures.SAMPLES).read_bytes().startswith(b"\x89PNG")
    lines = "\n".join(table.describe(evaluated.evaluation, evaluated.config))
    assert "By the prior: " in lines and "no trained VGG16 weights" in lines
    page = html_report.write(tiny_run[0] / "runs/tiny", None, "best", evaluated).read_text()
    assert "Prior over the codes" in page and "Near a training slice" in page


def test_the_nearest_slice_is_found(evaluated, tiny_run):
    slices = evaluate.open_run(tiny_run[0] / "runs/tiny", "train", log=quietly)[2]
    images = np.stack([slices[i][..., 0] for i in (4, 0, 7)]) * np.float32(0.99)
    every = np.stack([slices[i][..., 0] for i in range(len(slices))])
    distances = np.sqrt(((images[:, None] - every) ** 2).mean(axis=(2, 3)))
    places, found = measuring.nearest(images, slices)
    np.testing.assert_array_equal(places, distances.argmin(axis=1))
    np.testing.assert_allclose(found, distances.min(axis=1), rtol=1e-4)


def test_other_data_have_bits_and_no_samples(model, tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run[0])
    monkeypatch.setattr(measuring, "load", lambda *unused: model)
    options = {"measure_prior": measuring.measure, "log": quietly}
    evaluated = evaluate.evaluate_run(tiny_run[0] / "runs/tiny", "validation", **options)
    assert evaluated.evaluation.prior.samples is None
    assert "samples_ms_ssim" not in evaluated.evaluation.summary()


def test_a_run_without_a_prior_has_none_of_it(tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run[0])
    config, variables, slices = evaluate.open_run(tiny_run[0] / "runs/tiny", log=quietly)
    arguments = (tiny_run[0] / "runs/tiny", "best", config, variables, slices)
    assert measuring.measure(*arguments, with_samples=True, log=quietly) is None
