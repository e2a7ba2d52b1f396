"""A prior over a tiny run's codes: it resumes to the last bit, stops, and codes files in fewer bytes."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import nibabel
import numpy as np
import pytest
from conftest import run_script

import vqvae_jax
from vqvae_jax import prior_trainer
from vqvae_jax.coding import prior_coder, vqz
from vqvae_jax.config import PriorConfig
from vqvae_jax.errors import CheckpointError, ConfigError, DataError
from vqvae_jax.inference import vqz_files
from vqvae_jax.prior_trainer import PriorTrainer, train_prior
from vqvae_jax.runtime import runs
from vqvae_jax.training.checkpoint import Checkpoints
from vqvae_jax.training.prior_step import METRIC, make_prior

SMALL = PriorConfig(epochs=3, batch_size=8, channels=8, blocks=1, neighbours=2, learning_rate=1e-2)
STEPS_PER_EPOCH = 3

pytestmark = pytest.mark.usefixtures("compile_fast")


def quietly(line):
    del line


@pytest.fixture(scope="module")
def copied(tiny_run, tmp_path_factory):
    """A function that makes a copy of the tiny run, without a prior."""
    before = os.getcwd()
    os.chdir(tiny_run[0])

    def copy():
        run_dir = tmp_path_factory.mktemp("run") / "run"
        shutil.copytree(tiny_run[0] / "runs/tiny", run_dir)
        return run_dir

    yield copy
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(copied, compile_fast):
    """A run with a prior that was trained in one go, and how that ended."""
    run_dir = copied()
    return run_dir, train_prior(SMALL, run_dir, log=quietly)


def state_of(run_dir):
    """The newest parameters, as bytes."""
    run = runs.load_config(run_dir)
    checkpoints = Checkpoints(run_dir / runs.PRIOR, METRIC, read_only=True)
    found = checkpoints.restore_variables(make_prior(SMALL, run.model).shapes(), "newest")
    checkpoints.close()
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), found)


def test_it_is_trained_logged_and_better_than_no_prior(whole):
    run_dir, outcome = whole
    assert outcome.step == 3 * STEPS_PER_EPOCH and not outcome.stopped
    assert 0 < outcome.bits < outcome.raw_bits == 5
    lines = [json.loads(line) for line in (run_dir / "prior/metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if line["split"] == "validation"]
    assert [line["epoch"] for line in validation] == [1, 2, 3]
    assert min(line["bits_per_code"] for line in validation) == pytest.approx(outcome.bits)
    by_pass = sum(value for name, value in validation[-1].items() if name.startswith("pass_"))
    assert by_pass / 32 == pytest.approx(validation[-1]["bits_per_code"])  # 8 x 4 codes
    assert list((run_dir / "prior").glob("events.out.tfevents.*"))
    assert (run_dir / "prior" / prior_trainer.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("after", [pytest.param(STEPS_PER_EPOCH - 1, marks=pytest.mark.slow), STEPS_PER_EPOCH + 2])
def test_a_stopped_one_resumes_to_the_last_bit(whole, copied, monkeypatch, after):
    run_dir, seen, collect = copied(), [], PriorTrainer._collect

    def stopping(self, loss):
        collect(self, loss)
        seen.append(loss)
        if len(seen) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PriorTrainer, "_collect", stopping)
    outcome = train_prior(SMALL, run_dir, log=quietly)
    assert outcome.stopped and after <= outcome.step < 3 * STEPS_PER_EPOCH
    train_prior(runs.load_prior_config(run_dir), run_dir, resume=True, log=quietly)
    assert state_of(run_dir) == state_of(whole[0])


@pytest.mark.slow
def test_it_stops_where_nothing_improves(copied):
    lines = []
    config = dataclasses.replace(SMALL, epochs=9, patience=2, learning_rate=1e-30)
    assert train_prior(config, copied(), log=lines.append).step == 3 * STEPS_PER_EPOCH
    assert lines[-1].startswith("Stopped: no better bits for 2 epochs")


def test_another_prior_in_its_place_is_refused(whole):
    with pytest.raises(ConfigError, match="already holds a run"):
        train_prior(SMALL, whole[0], log=quietly)


def test_a_prior_of_another_model_is_not_used_nor_gone_on_with(whole, copied):
    run_dir = copied()
    shutil.copytree(whole[0] / runs.PRIOR, run_dir / runs.PRIOR)
    assert vqvae_jax.load(run_dir).prior is not None
    assert vqvae_jax.load(run_dir).prior_doubt == ""
    config = dataclasses.replace(runs.load_prior_config(run_dir), model="00ff" * 16)
    runs.save_config(run_dir / runs.PRIOR, config)
    assert vqvae_jax.load(run_dir).prior is None
    assert "is of another checkpoint" in vqvae_jax.load(run_dir).prior_doubt
    with pytest.raises(ConfigError, match="has changed since its prior was trained"):
        train_prior(config, run_dir, resume=True, log=quietly)


@pytest.fixture
def volume(tmp_path):
    """20 slices of 32 x 16 voxels of slowly changing noise."""
    rng = np.random.default_rng(0)
    voxels = np.cumsum(rng.normal(0, 10, (32, 16, 20)), axis=2) + rng.gamma(2, 100, (32, 16, 1))
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([1, 1, 3, 1])), tmp_path / "in.nii.gz")
    return tmp_path / "in.nii.gz"


def test_bits_are_what_coding_takes(whole, volume):
    model = vqvae_jax.load(whole[0])
    images = np.moveaxis(nibabel.load(volume).get_fdata(), 2, 0)
    together, alone = model.bits(images, volume=True), model.bits(images)
    assert together.shape == alone.shape == (20, 8, 4)
    np.testing.assert_array_equal(together[[0, 16]], alone[[0, 16]])
    assert (together[1] != alone[1]).any()
    np.testing.assert_array_equal(alone[7], model.bits(images[7])[0])


def test_a_run_without_a_prior_says_so(copied):
    with pytest.raises(CheckpointError, match=r"train one by scripts/train_prior\.py"):
        vqvae_jax.load(copied()).bits(np.zeros((32, 16)))


def damaged(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def test_files_are_coded_by_the_prior_and_a_damaged_byte_spoils_one_group(whole, volume, monkeypatch):
    model = vqvae_jax.load(whole[0])
    stored, out, expected = (volume.with_name(name) for name in ("a.vqz", "a.nii", "b.nii"))
    monkeypatch.setattr(vqz, "simple_to_bytes", lambda file: bytes(10**6))  # which is smaller after so little training
    made = vqz_files.encode_file(model, volume, stored)
    assert made.by_prior and "coded by the prior" in str(made)
    assert vqz_files.decode_file(model, stored, out) == ()
    model.reconstruct_nifti(volume, expected)
    assert out.read_bytes() == expected.read_bytes()

    damaged(stored, -10)  # among the last four slices
    with pytest.raises(DataError, match=r"is damaged: slices 17 to 20 are lost; .*--salvage"):
        vqz_files.decode_file(model, stored, out, overwrite=True)
    assert vqz_files.decode_file(model, stored, out, overwrite=True, salvage=True) == (16, 17, 18, 19)
    found, whole_file = (np.asarray(nibabel.load(path).dataobj) for path in (out, expected))
    np.testing.assert_array_equal(found[..., :16], whole_file[..., :16])
    assert (np.ptp(found[..., 16:], axis=(0, 1)) == 0).all()


def test_never_more_bytes_than_the_simple_coder(whole, volume):
    model = vqvae_jax.load(whole[0])
    size = vqz_files.encode_file(model, volume, volume.with_name("a.vqz")).size
    model.__dict__["prior"] = None
    assert size <= vqz_files.encode_file(model, volume, volume.with_name("b.vqz")).size


def test_a_file_of_another_prior_is_refused(whole, volume, monkeypatch):
    model, stored = vqvae_jax.load(whole[0]), volume.with_name("a.vqz")
    monkeypatch.setattr(vqz, "simple_to_bytes", lambda file: bytes(10**6))
    vqz_files.encode_file(model, volume, stored)
    model.__dict__["prior"] = None
    with pytest.raises(DataError, match=r"was coded by another prior .*this run's is none"):
        vqz_files.decode_file(model, stored, volume.with_name("a.nii"))


@pytest.mark.slow
def test_the_commands_train_encode_and_decode(copied, volume):
    run_dir = copied()
    flags = ["--workdir", run_dir, "--platform", "cpu"]
    done = run_script("train_prior.py", *flags, "--epochs", 1, "--batch-size", 8, "--channels", 8, cwd=volume.parent)
    assert done.returncode == 0, done.stderr
    assert "Best on the validation split: " in done.stdout
    done = run_script("train_prior.py", *flags, "--batch-size", 8, cwd=volume.parent)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    done = run_script("encode.py", volume, "a.vqz", *flags, cwd=volume.parent)
    assert done.returncode == 0, done.stderr
    done = run_script("decode.py", "a.vqz", "a.nii", *flags, cwd=volume.parent)
    assert done.returncode == 0, done.stderr


def test_the_metrics_of_validation_are_of_what_is_coded(whole):
    """The validator's bits, float and by slice, are the integer coder's, but for the rounding of the stream."""
    run_dir, outcome = whole
    model = vqvae_jax.load(run_dir)
    config = runs.load_prior_config(run_dir)
    run = runs.load_config(run_dir)
    survey = prior_trainer.hip_mri.look(run.data, run.model.image_size)
    (slices,) = prior_trainer.loader.open_splits(survey, run.data, run.model.image_size, ["validation"], quietly)
    codes = prior_trainer.CodeSource(
        run, prior_trainer.replicate(model._variables), slices, config.neighbours, 0
    ).plain()
    volumes = np.flatnonzero(codes.before[:, 0] < 0)
    bits = [prior_coder.bits(part, model.prior).sum() for part in np.split(codes.indices, volumes[1:])]
    assert sum(bits) / codes.indices.size == pytest.approx(outcome.bits, rel=0.01)
