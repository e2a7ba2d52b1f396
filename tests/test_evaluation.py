"""Evaluation: exact means over slices of different sizes, each on its own grid, whatever the batch."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqvae_jax import evaluation, training, workdir
from vqvae_jax.config import PRESETS, LossConfig
from vqvae_jax.data import loader, nifti

SIZE = (32, 16)
SHAPES = [(32, 16), (32, 24), (32, 16), (24, 16), (40, 16)]


def record(index, shape):
    image = np.random.default_rng(index).uniform(5, 900, shape).astype(np.float32)
    return {
        "image": image,
        "affine": np.eye(4),
        "range": np.array(nifti.intensity_range(image, (0.5, 99.5)), np.float32),
        "file": f"file{index}.nii".encode(),
        "case": b"case",
        "slice": index,
    }


@pytest.fixture(scope="module", params=["pad-crop", "resize"])
def setup(request):
    base = PRESETS["hipmri"]
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, image_size=SIZE, hidden_channels=8, embedding_dim=4, num_embeddings=16),
        data=dataclasses.replace(base.data, fit=request.param),
        loss=LossConfig(perceptual_weight=0),
        training=dataclasses.replace(base.training, batch_size=2),
    )
    slices = loader.Slices([record(*pair) for pair in enumerate(SHAPES)], config.data, SIZE)
    state = training.create_train_state(config, 1)
    return config, slices, state.variables, state.apply_fn


def test_every_metric_equals_scikit_images_on_the_slices_own_grid(setup):
    config, slices, variables, apply = setup
    found = evaluation.Evaluator(config, slices).run(variables)
    assert len(found.rows) == len(SHAPES)
    for index, row in enumerate(found.rows):
        sample = slices.sample(index)
        output = jax.jit(apply)(variables, slices[index][None])
        own = nifti.unfit(np.asarray(output.reconstruction)[0, ..., 0], SHAPES[index], config.data.fit)
        assert (row.height, row.width) == SHAPES[index]
        assert row.file == f"file{index}.nii"
        np.testing.assert_allclose(row.ssim, structural_similarity(own, sample.pixels, data_range=1), atol=1e-5)
        expected = peak_signal_noise_ratio(sample.pixels, own, data_range=1)
        np.testing.assert_allclose(row.psnr, expected, atol=1e-3)
        np.testing.assert_allclose(row.mae, np.abs(own - sample.pixels).mean(), atol=1e-6)


def test_means_and_counts_do_not_depend_on_the_batch(setup):
    config, slices, variables, _ = setup
    results = []
    for batch_size in (2, 3, 16):
        other = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=batch_size))
        results.append(evaluation.Evaluator(other, slices).run(variables, published_protocol=True))
    for result in results[1:]:
        assert result.counts.sum() == len(SHAPES) * 8 * 4
        np.testing.assert_array_equal(result.counts, results[0].counts)
        for name, value in results[0].summary().items():
            np.testing.assert_allclose(result.summary()[name], value, rtol=1e-4, err_msg=name)


def test_bits_per_pixel_counts_the_slices_own_pixels(setup):
    config, slices, variables, _ = setup
    summary = evaluation.Evaluator(config, slices).run(variables).summary()
    pixels = sum(height * width for height, width in SHAPES)
    np.testing.assert_allclose(summary["bits_per_pixel"], len(SHAPES) * 8 * 4 * 4 / pixels)


def test_results_are_written_for_every_slice(setup, tmp_path):
    config, slices, variables, _ = setup
    evaluator = evaluation.Evaluator(config, slices)
    found = evaluator.run(variables, published_protocol=True)
    evaluation.write_results(found, evaluator, variables, tmp_path / "eval", "as stated")
    with (tmp_path / "eval/per_slice.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ssim"]) for row in rows] == [row.ssim for row in found.rows]
    assert [float(row["ssim_published_protocol"]) for row in rows] == found.published
    assert (tmp_path / "eval/reconstructions.png").stat().st_size > 10_000


def test_the_newest_run_is_the_one_written_to_last(tmp_path):
    import os  # noqa: PLC0415

    for age, name in enumerate(("new", "old")):
        (tmp_path / name).mkdir()
        workdir.save_config(tmp_path / name, PRESETS["demo"])
        os.utime(tmp_path / name / workdir.CONFIG, (1000 - age, 1000 - age))
    assert workdir.newest(tmp_path).name == "new"
    (tmp_path / "old" / workdir.METRICS).write_text("")
    assert workdir.newest(tmp_path).name == "old"
