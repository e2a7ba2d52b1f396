"""Each benchmark runs, at a tiny size, and prints its table; how fast anything is, is not tested."""

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from benchmark_runs import run_benchmark, start_benchmark
from conftest import ROOT
from skimage.metrics import structural_similarity

from vqvae_jax.config import PRESETS, LossConfig, ModelConfig
from vqvae_jax.data import loader
from vqvae_jax.errors import ConfigError
from vqvae_jax.models import vgg16
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime.randomness import Purpose, integer_for

SMALL_MODEL = ("--image-size", 32, 16, "--hidden-channels", 8, "--rounds", 1, "--steps", 1)


@pytest.mark.slow
def test_train_step():
    pytest.importorskip("torch")
    against = ("--against", "torch", "jax-plain")  # torch.compile, which takes a minute, is tested by inference.py
    rows = run_benchmark("train_step.py", *SMALL_MODEL, "--batch-size", 2, "--matrix", 64, *against)
    assert [row.split()[1] for row in rows] == ["jax", "torch", "jax-plain"]


@pytest.mark.slow
def test_profile_step():
    rows = run_benchmark("profile_step.py", *SMALL_MODEL[:-4], "--no-vgg", "--no-attention", "--steps", 1, "--top", 5)
    assert [len(row.split("|")) for row in rows[:5]] == [6] * 5


def test_artefacts_change_the_image_as_they_say(benchmark_module):
    artefacts, rng = benchmark_module("artefacts"), np.random.default_rng(0)
    image = np.pad(np.full((32, 16), 0.4), 8)
    for artefact in artefacts.ARTEFACTS:
        altered = artefact(image, rng, 1.0)
        assert altered.shape == image.shape
        assert np.abs(altered - image).max() > 0.05
    stripes = np.abs(np.fft.fft2(artefacts.spike(image, rng, 1.0) - image))
    assert (stripes > 0.01 * stripes.max()).sum() == 2  # a point of k-space and its conjugate
    moved = artefacts.ghost(image, rng, 1.0) - image
    np.testing.assert_allclose(moved, 0.2 * np.roll(image, 24, axis=0))
    assert (artefacts.disc(image, rng, 1.0) == 0.9).any()


@pytest.mark.parametrize("preset", PRESETS)
def test_pytorchs_side_is_the_same_network(preset, benchmark_module):
    """As many tensors of each size as ours has, and as many codes for an image."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(PRESETS[preset].model, image_size=(32, 16), hidden_channels=8, reference_flatten=False)
    recipe = benchmark_module("_torch").Recipe(config)
    ours = jax.eval_shape(VQVAE(config).init, jax.random.key(0), jnp.zeros((1, 32, 16, 1)))["params"]
    theirs = [*recipe.encoder.parameters(), *recipe.decoder.parameters()]
    theirs += [*recipe.project_in.parameters(), *recipe.project_out.parameters()]
    if config.codebook_update == "gradient":
        theirs.append(recipe.quantizer.codebook)
    assert sorted(leaf.size for leaf in jax.tree.leaves(ours)) == sorted(tensor.numel() for tensor in theirs)
    images = torch.rand(2, 1, 32, 16)
    assert recipe.encode(images).shape == (2, *config.latent_size)
    assert recipe.decode(recipe.encode(images)).shape == recipe(images)[0].shape == images.shape


def test_pytorchs_ssim_is_ours(benchmark_module):
    torch = pytest.importorskip("torch")
    a, b = np.random.default_rng(0).random((2, 3, 1, 20, 30), np.float32)
    found = benchmark_module("_torch").ssim(torch.from_numpy(a), torch.from_numpy(b))
    expected = [structural_similarity(x[0], y[0], data_range=1) for x, y in zip(a, b, strict=True)]
    assert float(found) == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.slow
def test_inference():
    pytest.importorskip("torch")
    rows = run_benchmark("inference.py", *SMALL_MODEL, "--batch-sizes", 1)
    assert [row.split()[1] for row in rows] == ["encode", "decode", "reconstruct"]


@pytest.mark.slow
def test_time_to_quality(tiny_run):
    """Both contenders say that they missed a mark that no training passes."""
    pytest.importorskip("torch")
    phantom = next((tiny_run[0] / "data/phantom").iterdir())
    small = (*SMALL_MODEL[:-4], "--no-vgg", "--data", phantom, "--epochs", 1, "--batch-size", 2)
    rows = run_benchmark("time_to_quality.py", *small, "--mark", 1)
    assert [row.split()[1] for row in rows] == ["jax", "torch"]
    assert all("not in" in row for row in rows)


@pytest.mark.slow
def test_input_pipeline():
    rows = run_benchmark("input_pipeline.py", "--files", 40, "--image-size", 32, 16, "--rounds", 1)
    assert len(rows) == 5


@pytest.mark.slow
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


SMALL_RECIPE = (
    *("--image-size", 32, 16, "--hidden-channels", 8, "--embedding-dim", 4, "--num-embeddings", 8),
    *("--steps", 1, "--batch-size", 2, "--perceptual-weight", 0),
)


@pytest.mark.slow
def test_reference(tiny_run, tmp_path):
    pytest.importorskip("torch")
    place, _ = tiny_run
    phantom = next((place / "data/phantom").iterdir())
    arguments = ("--data", phantom, "--out", tmp_path, "--seeds", 0, 1, "--picture", "runs/tiny")
    rows = run_benchmark("reference.py", *SMALL_RECIPE, *arguments, cwd=place)
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

    def __init__(self, intensities):
        self._intensities = intensities

    def __len__(self):
        return len(self._intensities)

    def sample(self, index):
        raw = self._intensities[index]
        return loader.Sample(int(index), raw, tuple(np.percentile(raw, (1, 99))), "file", "case", 0, np.eye(4))


def random_slices(count):
    rng = np.random.default_rng(0)
    return SliceList([rng.gamma(2, 100, (32, 16)).astype(np.float32) for _ in range(count)])


def test_a_model_that_changes_nothing_scores_1(benchmark_module):
    pytest.importorskip("torch")
    reference, slices = benchmark_module("reference"), random_slices(3)
    scores = reference.score(Unchanged(), slices)
    for name in (reference.PROTOCOL, reference.INTENSITIES):
        np.testing.assert_allclose(scores.ssim[name], 1, atol=1e-5)
    assert (scores.ssim[reference.IMAGES] < 0.5).all()  # intensities are no image in [0, 1]
    raw = slices.sample(0).intensities
    z = (raw - raw.mean()) / raw.std()
    assert scores.originals[0].mean() == pytest.approx(z.clip(0, 1).mean(), abs=0.15)


def test_the_reference_is_trained_on_the_batches_of_a_run_with_its_seed(benchmark_module, monkeypatch):
    """Raw intensities of the slices that TrainLoader deals the trainer, in its order."""
    torch = pytest.importorskip("torch")
    reference, slices, seen = benchmark_module("reference"), random_slices(7), []

    def loss(model, features, images, weight):
        seen.append(images.numpy().copy())
        return sum(value.sum() for value in model.parameters())

    monkeypatch.setattr(reference._torch, "total_loss", loss)
    recipe = PRESETS["reference"]
    config = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, image_size=(32, 16), hidden_channels=8, embedding_dim=4),
        training=dataclasses.replace(recipe.training, batch_size=2, seed=5),
    )
    model = reference.train(config, 4, slices, None)
    assert not model.training and isinstance(model, torch.nn.Module)
    order = loader.TrainLoader(np.arange(len(slices)), 2, integer_for(5, Purpose.ORDER))
    expected = [[slices.sample(index).intensities[None] for index in next(order)] for _ in range(4)]
    np.testing.assert_array_equal(seen, expected)


def test_the_pytorch_sides_vgg16_and_loss_are_those_of_the_package(benchmark_module):
    """Features against VGG16 in Flax, normalised as the weights say; the loss against the tests' reference."""
    torch = pytest.importorskip("torch")
    jax_side, torch_side = benchmark_module("_jax"), benchmark_module("_torch")
    images = np.random.default_rng(0).random((2, 32, 16, 1), np.float32)
    expected = vgg16.VGG16().apply(vgg16.random_variables("relu3_3"), images)["relu3_3"]
    arrays = jax_side.vgg_arrays("random")
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    found = torch_side.Features(arrays)(inputs).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    moved = torch_side.Features(arrays | {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)})
    assert np.abs(moved(inputs).numpy().transpose(0, 2, 3, 1) - expected).max() > 0.1
    torch.manual_seed(0)
    model = torch_side.reference(ModelConfig(image_size=(32, 16), hidden_channels=8, embedding_dim=4, num_embeddings=8))
    weights = {name: torch.from_numpy(values) for name, values in arrays.items()}
    total = torch_side.torch_reference.losses(model, inputs, weights, 0.3)[0]
    assert torch_side.total_loss(model, torch_side.Features(arrays), inputs, 0.3).item() == pytest.approx(total.item())
    without = torch_side.torch_reference.losses(model, inputs, weights, 0.0)[0]
    assert torch_side.total_loss(model, None, inputs, 0.3).item() == pytest.approx(without.item())


def test_the_fast_reference_is_the_reference_with_channels_last(benchmark_module):
    torch = pytest.importorskip("torch")
    torch_side = benchmark_module("_torch")
    config = ModelConfig(image_size=(32, 16), hidden_channels=8, embedding_dim=4, num_embeddings=8)
    slow, fast = torch_side.reference(config, channels_last=True), torch_side.fast_reference(config)
    torch.manual_seed(0)
    torch_side.torch_reference.randomise(slow)
    fast.load_state_dict(slow.state_dict())
    images = torch.rand((2, 1, 32, 16))
    for one, other in zip(fast.eval()(images), slow.eval()(images), strict=True):
        torch.testing.assert_close(one, other)
    assert len(fast(images)[2].unique()) > 1


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


def test_every_recipe_of_the_table_can_be_trained(benchmark_module, monkeypatch):
    """The first row is the reference network and loss, the last of those that add up is hipmri; no two are alike."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    parse = importlib.import_module("train")._parse

    def config(flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        return parse()[0].config

    recipes = benchmark_module("ablation").recipes()
    first = config(recipes["reference network and loss"])
    assert (first.model, first.loss) == (ModelConfig(), LossConfig())
    assert config(recipes["+ pre-activation"]) == PRESETS["hipmri"]
    shared = ("--learning-rate", "5e-3", "--perceptual-weight", "0", "--hidden-channels", "32")
    assert len({repr(config((*shared, *changes))) for changes in recipes.values()}) == len(recipes)


@pytest.mark.slow
def test_runs_of_another_table_are_not_taken_for_this_ones(three_patients, tmp_path):
    """Refused before anything is trained, in one line that says what differs."""

    def run(*flags):
        where = ("--data", three_patients, "--out", tmp_path / "out", "--only", "no such row")
        return start_benchmark("ablation.py", *where, *flags)

    first = run("--shrink", "2", "--", "--epochs", "1")
    assert first.returncode == 0, first.stderr
    assert "shrunk by 2" in first.stdout
    assert "| recipe | SSIM | MS-SSIM | PSNR, dB | codes used | bits per pixel | by entropy | seconds |" in first.stdout
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
