"""Evaluation: exact means over slices of different sizes, each on its own grid, whatever the batch."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqvae_jax import evaluation, losses, metrics, training, workdir
from vqvae_jax.config import PRESETS, PUBLISHED, LossConfig
from vqvae_jax.data import loader, nifti
from vqvae_jax.models import vgg16

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
    base = PUBLISHED
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


def test_the_other_metrics_are_those_of_each_slice_alone(setup):
    """Against the metrics' own functions, which have tests of their own: batches and padding change nothing."""
    config, slices, variables, apply = setup
    found = evaluation.Evaluator(config, slices).run(variables)
    for index, row in enumerate(found.rows):
        sample = slices.sample(index)
        output = jax.jit(apply)(variables, slices[index][None])
        own = nifti.unfit(np.asarray(output.reconstruction)[0, ..., 0], SHAPES[index], config.data.fit)
        np.testing.assert_allclose(row.ms_ssim, metrics.ms_ssim(own[None], sample.pixels[None])[0], atol=1e-5)
        np.testing.assert_allclose(row.hfen, metrics.hfen(own[None], sample.pixels[None])[0], rtol=1e-4)
        assert row.ms_ssim != row.ssim and row.hfen > 0.1
    summary = found.summary()
    assert summary["hfen"] == pytest.approx(np.mean([row.hfen for row in found.rows]))
    assert summary["ms_ssim"] == pytest.approx(np.mean([row.ms_ssim for row in found.rows]))
    text = "\n".join(evaluation.describe(found, "as stated"))
    assert f"MS-SSIM: {summary['ms_ssim']:.4f}" in text and f"norm: {summary['hfen']:.4f}" in text
    assert "perceptual" not in summary and "perceptual" not in text


def test_perceptual_distance_where_there_are_weights_and_room(setup):
    """relu4_1 lies behind three pools: 8 pixels a side. A slice of 7 x 7 has every other metric."""
    config, _, variables, _ = setup
    layers = ("relu1_1", "relu4_1")
    config = dataclasses.replace(config, loss=LossConfig(perceptual_layers=layers))
    slices = loader.Slices([record(0, (32, 16)), record(1, (7, 7))], config.data, SIZE)
    vgg = vgg16.random_variables("relu4_1")
    found = evaluation.Evaluator(config, slices, vgg).run(variables)
    large, small = found.rows
    pixels = slices.sample(0).pixels[None, ..., None]
    output = training.make_eval_step(config)(variables, slices[0][None, None], np.ones((1, 1)))
    image, original = (vgg16.VGG16(layers).apply(vgg, x) for x in (output.reconstruction[0], pixels))
    np.testing.assert_allclose(large.perceptual, losses.perceptual_loss(image, original), rtol=1e-3)
    assert found.summary()["perceptual"] == large.perceptual > 0
    assert np.isnan(small.perceptual)
    assert np.isfinite([small.ssim, small.psnr, small.mae, small.ms_ssim, small.hfen]).all()
    assert "perceptual distance: " in "".join(evaluation.describe(found, "as stated"))


def test_a_slice_of_one_value_leaves_the_mean_error_norm_of_the_others():
    row = evaluation.SliceMetrics("f", "c", 0, 8, 8, ssim=0.5, psnr=20, mae=0.1, ms_ssim=0.5, hfen=0.5)
    flat = dataclasses.replace(row, hfen=float("nan"))
    used = np.ones((1, 4)), (4,)
    assert evaluation.Evaluation([row, flat], *used).summary()["hfen"] == 0.5
    assert np.isnan(evaluation.Evaluation([flat], *used).summary()["hfen"])
    broken = dataclasses.replace(row, ssim=float("nan"))
    assert np.isnan(evaluation.Evaluation([row, broken], *used).summary()["ssim"])


def test_bits_of_two_levels_add_up_and_their_use_is_told_apart():
    """By hand: 4 codes a slice of a level used alike (2 bits each), and 1 of a level of which 2 of 4 codes are used."""
    row = evaluation.SliceMetrics("f", "c", 0, 4, 4, ssim=0.5, psnr=20, mae=0.1, ms_ssim=0.5, hfen=0.5)
    found = evaluation.Evaluation([row, row], np.array([[2, 2, 2, 2], [0, 1, 1, 0]]), (4, 1))
    summary = found.summary()
    assert summary["bits_per_pixel"] == (4 * 2 + 1 * 2) / 16
    assert summary["bits_per_pixel_entropy"] == (4 * 2 + 1 * 1) / 16
    use = {name: summary[name] for name in summary if name.startswith(("perplexity", "codebook"))}
    assert use == {
        **{"perplexity": 3, "perplexity_bottom": 4, "perplexity_top": 2},
        **{"codebook_usage": 0.75, "codebook_usage_bottom": 1, "codebook_usage_top": 0.5},
    }
    said = "\n".join(evaluation.describe(found, "as stated"))
    assert "Perplexity: 4.0 / 2.0 (bottom / top) of 4 codes, codes used: 100.0% / 50.0%" in said


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
    per_code = np.log2(summary["perplexity"])
    assert 0 < per_code < 4
    np.testing.assert_allclose(summary["bits_per_pixel_entropy"], len(SHAPES) * 8 * 4 * per_code / pixels, rtol=1e-5)


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
