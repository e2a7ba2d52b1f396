"""Evaluating a run: its checkpoint and a split in, eval/SPLIT/ out."""

import csv
import dataclasses
import json

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread

from vqvae_jax.config import PRESETS
from vqvae_jax.data.splits import SPLIT_FOLDERS
from vqvae_jax.errors import CheckpointError
from vqvae_jax.evaluation import evaluate, pictures
from vqvae_jax.evaluation.evaluator import Evaluator
from vqvae_jax.runtime import runs
from vqvae_jax.training.checkpoint import Checkpoints, Progress
from vqvae_jax.training.state import create_train_state

pytestmark = pytest.mark.usefixtures("compile_fast")

COUNT = 7
SHAPES = [(32, 16), (32, 24)]


def write_data(folder, seed):
    rng = np.random.default_rng(seed)
    for split in SPLIT_FOLDERS.values():
        for index in range(COUNT):
            path = folder / split / f"case_{split[-3:]}_week_0_slice_{index}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = rng.integers(0, 900, SHAPES[index % 2]).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was never trained: its best checkpoint is of seed 0, its newest of seed 1."""
    place = tmp_path_factory.mktemp("run")
    demo = PRESETS["demo"]
    sizes = {"image_size": (32, 16), "hidden_channels": 8, "embedding_dim": 8, "num_embeddings": 16, "code_dim": 4}
    config = dataclasses.replace(
        demo,
        model=dataclasses.replace(demo.model, **sizes),
        data=dataclasses.replace(demo.data, data=write_data(place / "data", 0), tfds_dir=str(place / "tfds")),
        training=dataclasses.replace(demo.training, batch_size=4),
    )
    runs.save_config(place, config)
    checkpoints = Checkpoints(place)
    for seed, ssim in ((0, 0.9), (1, 0.1)):
        settings = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
        state = create_train_state(settings, 1)
        checkpoints.save(state.replace(step=state.step + seed), Progress(), ssim)
    checkpoints.close()
    return place, config


def quietly(line):
    del line


def test_results_are_written_for_every_slice(run):
    run_dir, config = run
    evaluated = evaluate.evaluate_run(run_dir, log=quietly)
    found, folder = evaluated.evaluation, run_dir / "eval/test"
    assert evaluated.config == config
    with (folder / "per_slice.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ssim"]) for row in rows] == [row.ssim for row in found.rows]
    assert [row["file"] for row in rows] == [
        f"{SPLIT_FOLDERS['test']}/case_est_week_0_slice_{i}.nii" for i in range(COUNT)
    ]
    assert [float(row["ssim_reference_protocol"]) for row in rows] == found.reference
    written = json.loads((folder / "metrics.json").read_text())
    assert written["ssim"] == found.summary()["ssim"]
    assert written["ssim_reference_protocol"] == found.summary()["ssim_reference_protocol"]
    assert (folder / evaluate.PICTURE).stat().st_size > 10_000
    assert imread(folder / evaluate.PICTURE).std() > 0.1


def test_the_picture_has_the_first_slices_and_the_best_median_and_worst(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_reconstructions", lambda path, rows: drawn.append(rows))
    evaluated = evaluate.evaluate_run(run[0], log=quietly)
    order = sorted(range(COUNT), key=lambda index: evaluated.evaluation.rows[index].ssim)
    indices = [0, 1, 2, 3, 4, order[-1], order[COUNT // 2], order[0]]
    labels = [*(f"slice {number} of 7" for number in range(1, 6)), "best", "median", "worst"]
    ((rows),) = drawn
    for row, index, label, (sample, own) in zip(rows, indices, labels, evaluated.reconstruct(indices), strict=True):
        assert row.label.startswith(f"{label}: case_est_week_0_slice_{index}.nii")
        assert row.ssim == evaluated.evaluation.rows[index].ssim
        np.testing.assert_array_equal(row.original, sample.pixels)
        np.testing.assert_array_equal(row.reconstruction, own)


@pytest.mark.parametrize(("which", "seed"), [("best", 0), pytest.param("newest", 1, marks=pytest.mark.slow)])
def test_the_checkpoint_and_the_split_are_those_asked_for(run, which, seed):
    run_dir, config = run
    evaluated = evaluate.evaluate_run(run_dir, "validation", which, log=quietly)
    assert (run_dir / "eval/validation/metrics.json").is_file()
    assert {row.case for row in evaluated.evaluation.rows} == {"case_ate"}
    settings = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
    _, _, slices = evaluate.open_run(run_dir, "validation", log=quietly)
    expected = Evaluator(config, slices).run(create_train_state(settings, 1).variables)
    assert evaluated.evaluation.summary()["ssim"] == pytest.approx(expected.summary()["ssim"], abs=1e-6)


@pytest.mark.slow
def test_other_files_can_be_evaluated_on(run, tmp_path):
    run_dir, config = run
    own = evaluate.evaluate_run(run_dir, log=quietly).evaluation
    evaluated = evaluate.evaluate_run(run_dir, data=write_data(tmp_path / "other", 1), log=quietly)
    assert evaluated.config.data.data == str(tmp_path / "other")
    assert runs.load_config(run_dir) == config
    assert evaluated.evaluation.summary()["ssim"] != own.summary()["ssim"]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        evaluate.evaluate_run(tmp_path, log=quietly)
