"""The recipe of hipmri, small, on a tiny phantom: it learns, resumes to the last bit, encodes, stops when lost."""

import dataclasses
import json
import os
import signal

import jax
import nibabel
import numpy as np
import optax
import pytest

import vqvae_jax
from vqvae_jax import metrics, trainer
from vqvae_jax.config import PRESETS
from vqvae_jax.data import hip_mri, intensity, loader
from vqvae_jax.errors import ConfigError, DataError, DivergenceError
from vqvae_jax.evaluation import evaluator, pictures
from vqvae_jax.models import vgg_weights
from vqvae_jax.runtime import runs
from vqvae_jax.training.checkpoint import Checkpoints
from vqvae_jax.training.state import create_train_state

STEPS_PER_EPOCH = 12
EPOCHS = 8
MARK = 0.6
"""Test SSIM of the whole run, which has 0.66. With one code for all, random codes or no gradient for the encoder it has
0.50 to 0.54. The mean training image has 0.49."""

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder that the runs of this file share; data sets and phantoms are made below it once."""
    folder = tmp_path_factory.mktemp("trainer")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Each takes seconds."""
    monkeypatch.setattr(pictures, "draw_reconstructions", lambda path, rows: None)


def tiny(**training_fields):
    """hipmri, with smaller images, network, codebook and batches; the perceptual term's VGG16 is random."""
    recipe = PRESETS["hipmri"]
    sizes = {"image_size": (32, 16), "hidden_channels": 32, "embedding_dim": 16, "num_embeddings": 32, "code_dim": 8}
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, **sizes),
        data=dataclasses.replace(recipe.data, data="phantom", phantom_cases=12, phantom_slices=4),
        loss=dataclasses.replace(recipe.loss, vgg_weights="random"),
        training=dataclasses.replace(recipe.training, **{"batch_size": 4, "sample_images": 0} | training_fields),
    )


def quietly(line):
    del line


def opened(*splits):
    """Splits of the runs' phantom."""
    survey = hip_mri.look(tiny().data, (32, 16))
    return loader.open_splits(survey, tiny().data, (32, 16), splits, quietly)


@pytest.fixture(scope="module")
def whole(place, compile_fast):
    """A run that was trained in one go, and how it ended."""
    return place / "whole", trainer.train_and_evaluate(tiny(epochs=EPOCHS), place / "whole", log=quietly)


def final_state(run, settings):
    checkpoints = Checkpoints(run, read_only=True)
    state, progress = checkpoints.restore(create_train_state(settings, STEPS_PER_EPOCH))
    checkpoints.close()
    return state, progress


def lines(run, split):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["split"] == split]


def test_it_is_the_recipe_of_hipmri():
    """Not a simpler one: only sizes, data and the weights of VGG16 differ."""
    found, recipe = (dataclasses.asdict(settings) for settings in (tiny(), PRESETS["hipmri"]))
    differing = {
        name for part in recipe if part != "preset" for name in recipe[part] if found[part][name] != recipe[part][name]
    }
    sizes = {"image_size", "hidden_channels", "embedding_dim", "num_embeddings", "code_dim", "batch_size"}
    assert differing <= sizes | {"data", "phantom_cases", "phantom_slices", "vgg_weights", "sample_images"}
    model, loss = tiny().model, tiny().loss
    assert (model.codebook_update, model.residual, model.latent_norm) == ("ema", "pre", False)
    assert model.code_dim > 0 and loss.ssim_weight > 0 and loss.perceptual_weight > 0


def test_the_loss_falls_and_ssim_rises_above_what_a_broken_model_has(whole):
    run, outcome = whole
    train, validation = lines(run, "train"), lines(run, "validation")
    assert [entry["epoch"] for entry in train] == list(range(1, EPOCHS + 1))
    assert train[-1]["l1"] < 0.7 * train[0]["l1"]
    assert train[-1]["perceptual"] < 0.9 * train[0]["perceptual"]
    assert validation[-1]["ssim"] > validation[0]["ssim"] + 0.1
    assert outcome.evaluation.summary()["ssim"] > MARK
    training, test = opened("train", "test")
    pixels = np.stack([test[index][..., 0] for index in range(len(test))])
    mean = np.mean([training[index][..., 0] for index in range(len(training))], axis=0)
    assert metrics.measure([mean] * len(pixels), list(pixels))["ssim"].mean() < MARK - 0.05


def stop_after(count, monkeypatch):
    """Sends this process SIGTERM while the run takes its step number ``count``."""
    make, taken = trainer.fitted_train_step, []

    def make_counting(*arguments):
        step, remat = make(*arguments)

        def counting(*arguments):
            taken.append(None)
            if len(taken) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        return counting, remat

    monkeypatch.setattr(trainer, "fitted_train_step", make_counting)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_twice_equals_one_in_one_go(place, whole, monkeypatch):
    """Stopped after an epoch, then within one."""
    settings, parts = tiny(epochs=EPOCHS), place / "parts"
    for more, steps in ((STEPS_PER_EPOCH, STEPS_PER_EPOCH), (5, STEPS_PER_EPOCH + 5)):
        with monkeypatch.context() as patched:
            stop_after(more, patched)
            stopped = trainer.train_and_evaluate(settings, parts, resume=parts.exists(), log=quietly)
        assert stopped.evaluation is None
        assert stopped.step == steps
    resumed = trainer.train_and_evaluate(settings, parts, resume=True, log=quietly)
    assert resumed.evaluation.summary() == whole[1].evaluation.summary()
    (one, one_progress), (other, other_progress) = final_state(whole[0], settings), final_state(parts, settings)
    assert one_progress == other_progress
    for name in ("step", "params", "model_state", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))
    for split in ("train", "validation"):
        for entry, same in zip(lines(whole[0], split), lines(parts, split), strict=True):
            timing = ("images_per_second", "input_wait")
            assert all(same[name] == value for name, value in entry.items() if name not in timing)


def test_the_trained_model_encodes_and_decodes_what_evaluation_measured(whole):
    """The same codes, and images of the same SSIM, by way of the codes alone."""
    run, outcome = whole
    (test,) = opened("test")
    model = vqvae_jax.load(run)
    counts = np.zeros_like(outcome.evaluation.counts)
    for index, row in enumerate(outcome.evaluation.rows):
        sample = test.sample(index)
        encoded = model.encode(sample.intensities, intensity_range=sample.range)
        decoded = model.decode(encoded)
        assert (decoded == model.reconstruct(sample.intensities, intensity_range=sample.range)).all()
        counts += np.bincount(encoded.indices.ravel(), minlength=len(counts))
        image = intensity.scale(decoded, *sample.range)
        found = metrics.measure([image], [sample.pixels])["ssim"][0]
        np.testing.assert_allclose(found, row.ssim, atol=1e-4)
    np.testing.assert_array_equal(counts, outcome.evaluation.counts)


def test_using_a_model_builds_no_optimizer(whole, monkeypatch):
    def no_optimizer(*arguments, **options):
        raise AssertionError("an optimizer was built")

    monkeypatch.setattr(optax, "adam", no_optimizer)
    with pytest.raises(AssertionError, match="an optimizer was built"):
        create_train_state(tiny(), STEPS_PER_EPOCH)
    vqvae_jax.load(whole[0]).reconstruct(np.zeros((32, 16)))
    vqvae_jax.evaluate_run(whole[0], log=quietly)


class Watched:
    """Images that came out of the trainer's evaluator, batch by batch, and rows that were drawn, picture by picture."""

    def __init__(self, monkeypatch):
        self.outputs, self.drawn = [], []
        make = evaluator.make_eval_step

        def make_watched(settings):
            step, first = make(settings), not self.outputs

            def watched(variables, images, mask):
                output = step(variables, images, mask)
                if first:  # not the test split's, which comes after training
                    self.outputs.append(np.asarray(output.reconstruction)[0, ..., 0])
                return output

            return watched

        monkeypatch.setattr(evaluator, "make_eval_step", make_watched)
        monkeypatch.setattr(pictures, "draw_reconstructions", lambda path, rows: self.drawn.append((path, rows)))


@pytest.mark.slow
def test_samples_are_drawn_from_the_reconstructions_that_validation_made(place, monkeypatch):
    """8 validation slices are 2 batches of 4 an epoch; the samples are of both, and no slice goes through twice."""
    watched = Watched(monkeypatch)
    trainer.train_and_evaluate(tiny(epochs=2, sample_images=3), place / "samples", log=quietly)
    assert len(watched.outputs) == 2 * 2
    samples = [(path, rows) for path, rows in watched.drawn if path.parent.name == runs.SAMPLES]
    assert [path.name for path, _ in samples] == ["epoch_0001.png", "epoch_0002.png"]
    (validation,) = opened("validation")
    for (_, rows), outputs in zip(samples, np.split(np.concatenate(watched.outputs), 2), strict=True):
        assert len(rows) == 3
        for index, row in zip((0, 3, 7), rows, strict=True):
            np.testing.assert_array_equal(row.reconstruction, outputs[index])
            np.testing.assert_array_equal(row.original, validation[index][..., 0])
            expected = metrics.measure([row.reconstruction], [row.original])["ssim"][0]
            assert row.ssim == pytest.approx(expected, abs=1e-5)


def test_a_signal_handler_is_put_back(whole):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(ConfigError):
        trainer.train_and_evaluate(tiny(epochs=1), whole[0], log=quietly)
    with trainer.stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.slow
def test_a_run_without_a_checkpoint_resumes_from_the_beginning(place):
    run = place / "early"
    run.mkdir()
    said = []
    trainer.train_and_evaluate(tiny(epochs=1), run, resume=True, log=said.append)
    assert any("from the beginning" in line for line in said)
    assert lines(run, "train")[0]["step"] == STEPS_PER_EPOCH


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(place, monkeypatch):
    make, run, settings = trainer.fitted_train_step, place / "lost", tiny(epochs=3)

    def make_failing(*arguments):
        step, remat = make(*arguments)

        def failing(state, images, vgg_variables):
            broken = images * np.where(int(state.step) == STEPS_PER_EPOCH + 1, np.nan, 1.0).astype(np.float32)
            return step(state, broken, vgg_variables)

        return failing, remat

    monkeypatch.setattr(trainer, "fitted_train_step", make_failing)
    with pytest.raises(DivergenceError, match=r"not finite at step 14 .*checkpoint is at step 12"):
        trainer.train_and_evaluate(settings, run, log=quietly)
    state, progress = final_state(run, settings)
    assert progress.epoch == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_run_is_not_resumed_on_other_data(whole):
    settings = tiny(epochs=EPOCHS)
    more = dataclasses.replace(settings, data=dataclasses.replace(settings.data, phantom_slices=5))
    with pytest.raises(ConfigError, match="--data has 60 training slices, but the run was trained on 48"):
        trainer.train_and_evaluate(more, whole[0], resume=True, log=quietly)


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_epoch(place):
    """Training, validation, pictures and checkpoints of later epochs find every program ready."""
    compiled, after_epoch = [], []

    def note(name, seconds, **_):
        del seconds
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    def log(line):
        if line.startswith("Epoch"):
            after_epoch.append(len(compiled))

    settings = tiny(epochs=4, accumulate=2, sample_images=2)
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, hidden_channels=8),
        loss=dataclasses.replace(settings.loss, perceptual_layers=("relu1_1",)),
    )
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        trainer.train_and_evaluate(settings, place / "compiled", log=log)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert after_epoch[0] > 0
    assert after_epoch[1:] == [after_epoch[1]] * 3


@pytest.fixture
def nothing_dear(monkeypatch):
    """Fails where VGG16's weights are read or fetched, or a data set is built."""

    def dear(*arguments, **options):
        raise AssertionError("something dear was begun")

    monkeypatch.setattr(vgg_weights, "load", dear)
    monkeypatch.setattr(hip_mri, "build", dear)


def on_files(folder, **training_fields):
    settings = tiny(**training_fields)
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, data=str(folder)))


@pytest.fixture
def files(tmp_path):
    """A folder of 8 training slices and 4 of each other split."""
    for split, count in (("train", 8), ("validate", 4), ("test", 4)):
        for index in range(count):
            path = tmp_path / f"set/keras_slices_{split}/case_{split}_week_0_slice_{index}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = np.random.default_rng(index).integers(0, 900, (32, 16)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return tmp_path / "set"


@pytest.mark.usefixtures("nothing_dear")
@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"batch_size": 9}, DataError, "has 8 slices, fewer than one batch of 9; use --batch-size 8 or less"),
        ({"warmup_steps": 24, "epochs": 12}, ConfigError, "--warmup-steps 24 is not below the 24 steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_dear(files, tmp_path, fields, kind, reason):
    with pytest.raises(kind, match=reason):
        trainer.train_and_evaluate(on_files(files, **fields), tmp_path / "run", log=quietly)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nothing_dear")
def test_a_file_of_four_axes_is_refused_before_anything_dear(files, tmp_path):
    series = nibabel.Nifti1Image(np.zeros((32, 16, 3, 5), np.int16), np.eye(4))
    nibabel.save(series, files / "keras_slices_train/case_series_week_0_slice_0.nii.gz")
    with pytest.raises(DataError, match=r"1 of 17 files cannot be used: .*case_series.*--on-bad-file skip"):
        trainer.train_and_evaluate(on_files(files), tmp_path / "run", log=quietly)


@pytest.mark.usefixtures("nothing_dear")
@pytest.mark.parametrize(("epochs", "warned"), [(49, True), (50, False)])
def test_a_training_too_short_to_learn_is_a_warning(files, tmp_path, epochs, warned):
    """2 steps an epoch; the warning comes before anything dear."""
    said = []
    with pytest.raises(AssertionError, match="something dear"):
        trainer.train_and_evaluate(on_files(files, epochs=epochs), tmp_path / "run", log=said.append)
    found = [line for line in said if "too few to learn" in line]
    assert len(found) == warned
    if warned:
        assert found[0].startswith("Warning: 98 steps (49 epochs of 2)")
        assert "--epochs" in found[0] and "--batch-size" in found[0]


def test_a_warm_up_without_end_is_refused(place):
    with pytest.raises(ConfigError, match=r"--warmup-steps 24 is not below the 24 steps .*2 epochs of 12"):
        trainer.train_and_evaluate(tiny(epochs=2, warmup_steps=24), place / "cold", log=quietly)
