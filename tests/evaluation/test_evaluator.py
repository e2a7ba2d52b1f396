"""The evaluator: exact metrics of slices of different sizes, each on its own grid, whatever the batch."""

import collections
import csv
import dataclasses

import jax
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqvae_jax import metrics
from vqvae_jax.config import Config, DataConfig, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.data import grid, intensity, loader
from vqvae_jax.evaluation import reference_protocol, table
from vqvae_jax.evaluation.evaluator import Evaluator
from vqvae_jax.models import vgg16
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.training.losses import perceptual_loss
from vqvae_jax.training.state import create_train_state
from vqvae_jax.training.step import make_eval_step

pytestmark = pytest.mark.usefixtures("compile_fast")

SIZE = (32, 16)
SHAPES = [(32, 16), (32, 24), (32, 16), (24, 16), (40, 16)]


class Records:
    """A data source of slices of SHAPES, which counts how often each is read."""

    def __init__(self, shapes):
        self.records = [self._record(index, shape) for index, shape in enumerate(shapes)]
        self.read = collections.Counter()

    def _record(self, index, shape):
        image = np.random.default_rng(index).uniform(5, 900, shape).astype(np.float32)
        return {
            "image": image,
            "affine": np.eye(4),
            "range": np.array(intensity.intensity_range(image, (0.5, 99.5)), np.float32),
            "file": f"file{index}.nii".encode(),
            "case": b"case",
            "slice": index,
        }

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.read[int(index)] += 1
        return self.records[index]


def configuration(fit, **model):
    sizes = {"image_size": SIZE, "hidden_channels": 8, "embedding_dim": 4, "num_embeddings": 16}
    return Config(
        model=ModelConfig(**sizes, **model),
        data=DataConfig(fit=fit),
        loss=LossConfig(perceptual_weight=0),
        training=TrainingConfig(batch_size=2),
    )


@pytest.fixture(scope="module", params=["pad-crop", pytest.param("resize", marks=pytest.mark.slow)])
def setup(request):
    config = configuration(request.param)
    slices = loader.Slices(Records(SHAPES), config.data, SIZE)
    return config, slices, create_train_state(config, 1).variables


def reconstructed(config, variables, slices, index):
    """The model's image of one slice, on the slice's own grid."""
    output = jax.jit(VQVAE(config.model).apply)(variables, slices[index][None])
    return grid.unfit(np.asarray(output.reconstruction)[0, ..., 0], slices.sample(index).pixels.shape, config.data.fit)


def test_every_metric_equals_scikit_images_on_the_slices_own_grid(setup):
    config, slices, variables = setup
    found = Evaluator(config, slices).run(variables)
    assert len(found.rows) == len(SHAPES)
    for index, row in enumerate(found.rows):
        sample, own = slices.sample(index), reconstructed(config, variables, slices, index)
        assert (row.height, row.width) == SHAPES[index]
        assert (row.file, row.case, row.slice) == (f"file{index}.nii", "case", index)
        np.testing.assert_allclose(row.ssim, structural_similarity(own, sample.pixels, data_range=1), atol=1e-5)
        expected = peak_signal_noise_ratio(sample.pixels, own, data_range=1)
        np.testing.assert_allclose(row.psnr, expected, atol=1e-3)
        np.testing.assert_allclose(row.mae, np.abs(own - sample.pixels).mean(), atol=1e-6)


@pytest.mark.slow
def test_the_other_metrics_are_those_of_each_slice_alone(setup):
    """Against the metrics' own functions, which have tests of their own: batches and padding change nothing."""
    config, slices, variables = setup
    found = Evaluator(config, slices).run(variables)
    for index, row in enumerate(found.rows):
        sample, own = slices.sample(index), reconstructed(config, variables, slices, index)
        np.testing.assert_allclose(row.ms_ssim, metrics.ms_ssim(own[None], sample.pixels[None])[0], atol=1e-5)
        np.testing.assert_allclose(row.hfen, metrics.hfen(own[None], sample.pixels[None])[0], rtol=1e-4)
        assert row.ms_ssim != row.ssim and row.hfen > 0.1
    summary = found.summary()
    assert summary["hfen"] == pytest.approx(np.mean([row.hfen for row in found.rows]))
    assert summary["ms_ssim"] == pytest.approx(np.mean([row.ms_ssim for row in found.rows]))
    text = "\n".join(table.describe(found, config))
    assert f"MS-SSIM: {summary['ms_ssim']:.4f}" in text and f"norm: {summary['hfen']:.4f}" in text
    assert "perceptual" not in summary and "perceptual" not in text


@pytest.mark.slow
def test_perceptual_distance_where_there_are_weights_and_room(setup):
    """relu4_1 lies behind three pools: 8 pixels a side. A slice of 7 x 7 has every other metric."""
    config, _, variables = setup
    layers = ("relu1_1", "relu4_1")
    config = dataclasses.replace(config, loss=LossConfig(perceptual_layers=layers))
    slices = loader.Slices(Records([(32, 16), (7, 7)]), config.data, SIZE)
    vgg = vgg16.random_variables("relu4_1")
    found = Evaluator(config, slices, vgg).run(variables)
    large, small = found.rows
    pixels = slices.sample(0).pixels[None, ..., None]
    output = make_eval_step(config)(variables, slices[0][None, None], np.ones((1, 1)))
    image, original = (vgg16.VGG16(layers).apply(vgg, x) for x in (output.reconstruction[0], pixels))
    np.testing.assert_allclose(large.perceptual, perceptual_loss(image, original), rtol=1e-3)
    assert found.summary()["perceptual"] == large.perceptual > 0
    assert np.isnan(small.perceptual)
    assert np.isfinite([small.ssim, small.psnr, small.mae, small.ms_ssim, small.hfen]).all()
    assert "perceptual distance: " in "".join(table.describe(found, config))


@pytest.mark.slow
def test_means_and_counts_do_not_depend_on_the_batch(setup):
    config, slices, variables = setup
    results = []
    for batch_size in (2, 3, 16):
        other = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=batch_size))
        results.append(Evaluator(other, slices).run(variables, reference_protocol=True))
    for result in results[1:]:
        assert result.counts.sum() == len(SHAPES) * 8 * 4
        np.testing.assert_array_equal(result.counts, results[0].counts)
        for name, value in results[0].summary().items():
            np.testing.assert_allclose(result.summary()[name], value, rtol=1e-4, err_msg=name)


def test_bits_per_pixel_counts_the_slices_own_pixels(setup):
    config, slices, variables = setup
    summary = Evaluator(config, slices).run(variables).summary()
    pixels = sum(height * width for height, width in SHAPES)
    np.testing.assert_allclose(summary["bits_per_pixel"], len(SHAPES) * 8 * 4 * 4 / pixels)
    per_code = np.log2(summary["perplexity"])
    assert 0 < per_code < 4
    np.testing.assert_allclose(summary["bits_per_pixel_entropy"], len(SHAPES) * 8 * 4 * per_code / pixels, rtol=1e-5)


def test_slices_are_kept_with_their_reconstructions_in_whatever_batch_they_were(setup):
    config, slices, variables = setup
    evaluator = Evaluator(config, slices)
    kept = evaluator.run(variables, keep=[4, 1]).kept
    assert kept.keys() == {1, 4}
    for index, (sample, own) in kept.items():
        assert sample.index == index
        np.testing.assert_array_equal(sample.intensities, slices.sample(index).intensities)
        np.testing.assert_allclose(own, reconstructed(config, variables, slices, index), atol=1e-5)
    again = dict(zip((4, 1), evaluator.reconstruct(variables, [4, 1]), strict=True))
    for index, (sample, own) in again.items():
        assert sample.index == index
        np.testing.assert_array_equal(own, kept[index][1])
    assert evaluator.run(variables).kept == {}


@pytest.mark.parametrize("reference_flatten", [False, True])
@pytest.mark.parametrize("protocol", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_record_is_read_once(protocol, reference_flatten):
    config = configuration("resize", reference_flatten=reference_flatten)
    records = Records(SHAPES)
    slices = loader.Slices(records, config.data, SIZE)
    variables = create_train_state(config, 1).variables
    Evaluator(config, slices).run(variables, reference_protocol=protocol, keep=[0, 3])
    assert records.read == dict.fromkeys(range(len(SHAPES)), 1)


@pytest.mark.parametrize("reference_flatten", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ssim_by_the_reference_protocol(reference_flatten):
    """An imported model is given z-scored slices of 256 x 256; one of this package reconstructs as always."""
    config = configuration("resize", reference_flatten=reference_flatten)
    slices = loader.Slices(Records(SHAPES[:3]), config.data, SIZE)
    variables = create_train_state(config, 1).variables
    found = Evaluator(config, slices).run(variables, reference_protocol=True)
    for index, ssim in enumerate(found.reference):
        raw, (low, high) = slices.sample(index).intensities, slices.sample(index).range
        if reference_flatten:
            z = grid.fit((raw - raw.mean()) / raw.std(), (256, 256), "resize")
            output = VQVAE(config.model).apply(variables, z[None, ..., None])
            compared = np.clip(np.asarray(output.reconstruction)[0, ..., 0], 0, 1)
        else:
            scanner = reconstructed(config, variables, slices, index) * (high - low) + low
            compared = reference_protocol.to_compare(scanner, raw)
        original = reference_protocol.to_compare(raw, raw)
        np.testing.assert_allclose(ssim, structural_similarity(compared, original, data_range=1), atol=1e-4)
    assert found.summary()["ssim_reference_protocol"] == pytest.approx(np.mean(found.reference))
    assert "SSIM by the reference protocol: " in "".join(table.describe(found, config))


def test_a_slice_of_one_value_is_marked_as_empty(setup, tmp_path):
    config, _, variables = setup
    records = Records([SIZE, SIZE])
    records.records[0] |= {"image": np.full(SIZE, 7, np.float32), "range": np.float32([7, 7])}
    found = Evaluator(config, loader.Slices(records, config.data, SIZE)).run(variables)
    assert [row.empty for row in found.rows] == [True, False]
    table.write(found, tmp_path, config)
    with (tmp_path / "per_slice.csv").open(encoding="utf-8") as file:
        assert [row["empty"] for row in csv.DictReader(file)] == ["True", "False"]
