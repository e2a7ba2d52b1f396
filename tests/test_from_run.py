"""Runs that start from runs: fine-tuning, and training with the prior for fewer bits."""

import dataclasses
import functools
import importlib
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import ROOT

import vqvae_jax
from vqvae_jax import trainer
from vqvae_jax.config import PriorConfig
from vqvae_jax.errors import CheckpointError, ConfigError
from vqvae_jax.evaluation import pictures
from vqvae_jax.prior_trainer import train_prior
from vqvae_jax.runtime import runs
from vqvae_jax.training import from_run
from vqvae_jax.training.checkpoint import load_variables
from vqvae_jax.training.prior_step import codebook_of, make_prior
from vqvae_jax.training.state import create_train_state

SMALL = PriorConfig(epochs=1, batch_size=8, channels=8, blocks=1, neighbours=2, learning_rate=1e-2)

pytestmark = pytest.mark.usefixtures("compile_fast")


def quietly(line):
    del line


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Each takes seconds."""
    monkeypatch.setattr(pictures, "draw_reconstructions", lambda path, rows: None)


@pytest.fixture(scope="module")
def source(tiny_run, tmp_path_factory):
    """A copy of the tiny run, with a prior."""
    before = os.getcwd()
    os.chdir(tiny_run[0])
    run_dir = tmp_path_factory.mktemp("from") / "source"
    shutil.copytree(tiny_run[0] / "runs/tiny", run_dir)
    train_prior(SMALL, run_dir, log=quietly)
    yield run_dir
    os.chdir(before)


def config_from(source, model=None, rate_weight=0.0, **training):
    config = runs.load_config(source)
    fields = {"from_run": str(source), "epochs": 2, "sample_images": 0} | training
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **(model or {})),
        loss=dataclasses.replace(config.loss, rate_weight=rate_weight),
        training=dataclasses.replace(config.training, **fields),
    )


def variables_of(run_dir, which="newest"):
    return load_variables(run_dir, runs.load_config(run_dir), which)


def test_fine_tuning_starts_with_weights_codebook_and_later_prior_of_the_best_checkpoint(source, tmp_path):
    trainer.train_and_evaluate(config_from(source, learning_rate=1e-12), tmp_path / "run", log=quietly)
    before, after = variables_of(source, "best")["params"], variables_of(tmp_path / "run")["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), before, after)
    assert runs.load_config(tmp_path / "run").training.from_run == str(source)
    assert not (tmp_path / "run/prior").exists()
    lines = []
    train_prior(dataclasses.replace(SMALL, learning_rate=1e-12), tmp_path / "run", log=lines.append)
    assert any("starts from the prior of" in line for line in lines)
    before, after = (vqvae_jax.load(folder).prior.prior.fingerprint for folder in (source, tmp_path / "run"))
    assert before == after


def test_with_a_rate_weight_the_run_has_a_prior_of_its_own_that_codes_its_files(source, tmp_path):
    lines, run_dir = [], tmp_path / "run"
    trainer.train_and_evaluate(config_from(source, rate_weight=0.5), run_dir, log=lines.append)
    assert any("Bits a pixel: " in line for line in lines)
    np.testing.assert_array_equal(codebook_of(variables_of(source, "best")), codebook_of(variables_of(run_dir)))
    model = vqvae_jax.load(run_dir)
    assert model.fingerprint != vqvae_jax.load(source).fingerprint
    assert model.prior is not None and not model.prior_doubt
    assert model.prior.prior.fingerprint != vqvae_jax.load(source).prior.prior.fingerprint


def prior_that_starts(config):
    """The prior that is trained along, as a function of codes, known, before and present; and its learning rate."""
    prior = from_run.prior_config(config)
    state = from_run.beside_prior(config, prior, create_train_state(config, 1), 1)
    params = from_run.with_prior(config, prior, state).prior.params
    return functools.partial(make_prior(prior, config.model).apply, {"params": params}), prior.learning_rate


def test_the_prior_starts_the_same_for_images_of_another_size_and_learns_more_slowly(source):
    model = runs.load_config(source).model
    height, width = model.image_size
    config = config_from(source, rate_weight=0.5, model={"image_size": (2 * height, width)})
    (before, _), (after, rate) = prior_that_starts(config_from(source, rate_weight=0.5)), prior_that_starts(config)
    rows, columns = config.model.latent_size
    draws = np.random.default_rng(0)
    codes = draws.integers(model.num_embeddings, size=(1, rows, columns))
    others = draws.integers(model.num_embeddings, size=(1, SMALL.neighbours, rows, columns))
    given = codes, draws.random(codes.shape) < 0.5, others, np.ones((1, SMALL.neighbours), bool)
    np.testing.assert_array_equal(after(*given), before(*given))
    assert rate == 0.25 * SMALL.learning_rate


@pytest.mark.slow
def test_a_stopped_rate_training_goes_on_without_its_source_to_the_last_bit(source, tmp_path, monkeypatch):
    lent = tmp_path / "lent"
    shutil.copytree(source, lent)
    config = config_from(lent, rate_weight=0.5)
    trainer.train_and_evaluate(config, tmp_path / "whole", log=quietly)
    make, taken = trainer.fitted_train_step, []

    def make_counting(*arguments):
        step, remat = make(*arguments)

        def counting(*given):
            taken.append(None)
            if len(taken) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*given)

        return counting, remat

    monkeypatch.setattr(trainer, "fitted_train_step", make_counting)
    assert trainer.train_and_evaluate(config, tmp_path / "cut", log=quietly).evaluation is None
    shutil.rmtree(lent)
    trainer.train_and_evaluate(config, tmp_path / "cut", resume=True, log=quietly)
    jax.tree.map(np.testing.assert_array_equal, variables_of(tmp_path / "whole"), variables_of(tmp_path / "cut"))
    whole, cut = (vqvae_jax.load(tmp_path / name).prior.prior.fingerprint for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate_weight": 0.5, "from_run": None}, "needs --from RUN"),
        ({"rate_weight": 0.5, "accumulate": 2}, "--accumulate"),
        ({"rate_weight": 0.5, "model": {"precision": "bfloat16"}}, "--precision float32"),
        ({"model": {"hidden_channels": 16}}, "--hidden-channels 16: the model of --from .* has 8"),
    ],
)
def test_what_cannot_work_is_told_and_leaves_no_folder(source, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        trainer.train_and_evaluate(config_from(source, **changes), tmp_path / "run", log=quietly)
    assert not (tmp_path / "run").exists()


def test_a_rate_weight_needs_a_prior_of_the_best_checkpoint(source, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    prior = runs.load_prior_config(bare)
    runs.save_config(bare / runs.PRIOR, dataclasses.replace(prior, model="0" * 64))
    with pytest.raises(ConfigError, match="is of another checkpoint"):
        trainer.train_and_evaluate(config_from(bare, rate_weight=0.5), tmp_path / "run", log=quietly)
    shutil.rmtree(bare / runs.PRIOR)
    with pytest.raises(ConfigError, match=r"has no prior.*train_prior\.py"):
        trainer.train_and_evaluate(config_from(bare, rate_weight=0.5), tmp_path / "run", log=quietly)
    lost = config_from(source, from_run=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"none/config\.json"):
        trainer.train_and_evaluate(lost, tmp_path / "run", log=quietly)


def test_the_command_takes_the_other_runs_settings(source, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    train = importlib.import_module("train")
    given = ["train.py", "--from", os.path.relpath(source), "--learning-rate", "1e-5"]
    monkeypatch.setattr("sys.argv", given)
    made, before = train._parse()[0].config, runs.load_config(source)
    assert made.model == before.model and made.data == before.data
    assert made.training == dataclasses.replace(before.training, learning_rate=1e-5, from_run=str(source))
    monkeypatch.setattr("sys.argv", [*given, "--preset", "hipmri"])
    with pytest.raises(ConfigError, match="--from has the settings"):
        train._parse()
