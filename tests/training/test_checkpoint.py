"""What is restored is what was saved, bit for bit, and whatever is not is refused in one line."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqvae_jax.config import Config, ModelConfig, TrainingConfig
from vqvae_jax.errors import CheckpointError
from vqvae_jax.runtime.runs import CHECKPOINTS
from vqvae_jax.training.checkpoint import Checkpoints, Progress, load_variables
from vqvae_jax.training.state import TrainState, create_train_state

ADAM = optax.adam(1e-3)
PROGRESS = Progress(epoch=3, steps_in_epoch=7, slices=5, loader={"position": [1, 2]}, sums={"loss": 0.1 + 0.2})


def state(step=0, width=64):
    """A training state with random numbers in every array; each step has its own."""
    rng = np.random.default_rng(step)
    params = {"conv": {"kernel": jnp.zeros((width, width)), "bias": jnp.zeros(width)}}
    model_state = {"batch_stats": {"mean": jnp.zeros(width)}, "ema": {"started": jnp.ones((), bool)}}
    empty = TrainState.create(apply_fn=None, params=params, model_state=model_state, tx=ADAM)

    def fill(leaf):
        leaf = jnp.asarray(leaf)
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) if leaf.dtype == jnp.float32 else leaf

    return jax.tree.map(fill, empty).replace(step=jnp.asarray(step, jnp.int32))


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path)
    yield opened
    opened.close()


def save(checkpoints, step, ssim, progress=PROGRESS):
    checkpoints.save(state(step), progress, ssim)
    checkpoints.wait()


def steps_on_disk(run):
    return sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with its best checkpoint at step 1 and its newest at step 2; to be read, or copied and damaged."""
    run = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(run)
    save(checkpoints, 1, 0.9)
    save(checkpoints, 2, 0.5)
    checkpoints.close()
    return run


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("which", "step"), [("newest", 2), ("best", 1)])
def test_restores_every_bit(saved, which, step):
    found, progress = Checkpoints(saved, read_only=True).restore(state(), which)
    assert_identical(found, state(step))
    assert progress == PROGRESS


@pytest.mark.parametrize(("which", "step"), [("newest", 2), ("best", 1)])
def test_variables_are_restored_without_the_optimizer(saved, tmp_path, which, step):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / CHECKPOINTS / str(step) / "optimizer")
    found = Checkpoints(tmp_path, read_only=True).restore_variables(state().variables, which)
    assert_identical(found, state(step).variables)


@pytest.mark.parametrize("which", ["newest", "best"])
def test_the_variables_of_a_run_are_those_of_its_configuration(tmp_path, which):
    model = ModelConfig(image_size=(16, 16), hidden_channels=8, embedding_dim=4, num_embeddings=8, residual_blocks=0)
    config = Config(model=model)
    states = [
        create_train_state(dataclasses.replace(config, training=TrainingConfig(seed=seed)), steps_per_epoch=1)
        for seed in (0, 1)
    ]
    checkpoints = Checkpoints(tmp_path)
    for step, (current, ssim) in enumerate(zip(states, (0.9, 0.5), strict=True), 1):
        checkpoints.save(current.replace(step=jnp.int32(step)), PROGRESS, ssim)
    checkpoints.close()
    expected = states[0 if which == "best" else 1].variables
    assert_identical(load_variables(tmp_path, config, which), expected)
    if which == "best":
        assert_identical(load_variables(tmp_path, config), expected)
    other = dataclasses.replace(config, model=dataclasses.replace(model, num_embeddings=9))
    with pytest.raises(CheckpointError, match=r"codebook is \(8, 4\), but \(9, 4\) in the model of config\.json"):
        load_variables(tmp_path, other, which)
    with pytest.raises(CheckpointError, match="no checkpoints"):
        load_variables(tmp_path / "other", config)


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([0.5], [1], 1),
        ([0.3, 0.9, 0.5, 0.4], [2, 4], 2),
        ([0.1, 0.2, 0.3], [3], 3),
        ([0.1, None, None], [1, 3], 1),
        ([-0.2, None], [1, 2], 1),
        ([None, 0.1, float("nan")], [2, 3], 2),
        ([None], [1], 1),
    ],
)
def test_newest_and_best_by_ssim_are_kept_and_all_others_gone(checkpoints, tmp_path, scores, kept, best):
    for step, ssim in enumerate(scores, 1):
        save(checkpoints, step, ssim)
    for manager in (checkpoints, Checkpoints(tmp_path, read_only=True)):
        assert (manager.step("best"), manager.step("newest")) == (best, len(scores))
    assert steps_on_disk(tmp_path) == kept


def test_saving_a_step_again_changes_nothing(checkpoints):
    save(checkpoints, 1, 0.5)
    save(checkpoints, 1, 0.9, progress=Progress(epoch=99))
    assert checkpoints.restore(state())[1] == PROGRESS


def test_saving_is_not_disturbed_by_the_next_step(checkpoints):
    """The training step reuses its old state's buffers while the save still runs."""
    current = state(1, width=512)
    expected = jax.device_get(jax.tree.map(jnp.copy, current))
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + x.astype(x.dtype), tree), donate_argnums=0)
    checkpoints.save(current, PROGRESS, None)
    for _ in range(5):
        current = jax.block_until_ready(advance(current))
    checkpoints.wait()
    assert_identical(checkpoints.restore(state(width=512))[0], expected)


def test_a_run_goes_on_where_it_was_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    reopened = Checkpoints(tmp_path)
    save(reopened, 3, 0.7)
    reopened.close()
    assert steps_on_disk(tmp_path) == [1, 3]


def data_files(folder):
    """The files that hold arrays, largest first."""
    return sorted(folder.rglob("d/*"), key=lambda path: -path.stat().st_size)


def flip_a_byte(path, where):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0xFF
    path.write_bytes(content)


DAMAGE = {
    "flipped near the start": lambda path: flip_a_byte(path, 0.1),
    "flipped in the middle": lambda path: flip_a_byte(path, 0.5),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_damaged_arrays_are_refused(saved, tmp_path, capfd, item, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](data_files(tmp_path / CHECKPOINTS / "2" / item)[0])
    checkpoints = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(state(), "newest")
    assert_one_line(caught, tmp_path / CHECKPOINTS, "step 2", "to use step 1")
    assert "Traceback" not in capfd.readouterr().err
    assert_identical(checkpoints.restore(state(), "best")[0], state(1))  # the other is untouched


@pytest.mark.parametrize("name", ["progress/metadata", "model/_METADATA", "crc32.json", "metrics/metrics"])
@pytest.mark.parametrize("damage", ["cut short", "empty"])
def test_damaged_descriptions_are_refused(saved, tmp_path, name, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path / CHECKPOINTS / "2" / name)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, read_only=True).restore(state(), "newest")
    assert_one_line(caught, tmp_path / CHECKPOINTS)


def assert_one_line(caught, *parts):
    assert "\n" not in str(caught.value)
    assert all(str(part) in str(caught.value) for part in parts)


@pytest.mark.parametrize("other", ["shapes", "names"])
def test_another_model_is_refused(saved, capfd, other):
    like = state(width=8) if other == "shapes" else state().replace(model_state={})
    checkpoints = Checkpoints(saved, read_only=True)
    for restore in (lambda: checkpoints.restore(like), lambda: checkpoints.restore_variables(like.variables)):
        with pytest.raises(CheckpointError, match="batch_stats/mean is ") as caught:
            restore()
        assert_one_line(caught, saved / CHECKPOINTS)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("made", ["nothing", "run", "checkpoints"])
def test_reading_where_nothing_was_saved_creates_nothing(tmp_path, made):
    run = tmp_path / "run"
    if made != "nothing":
        (run / CHECKPOINTS if made == "checkpoints" else run).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(run, read_only=True).restore(state())
    assert_one_line(caught, run / CHECKPOINTS)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_checkpoints_is_empty(checkpoints):
    assert checkpoints.empty()
    with pytest.raises(CheckpointError):
        checkpoints.step("best")
    save(checkpoints, 1, None)
    assert not checkpoints.empty()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path / "run")
    assert_one_line(caught, tmp_path / "run" / CHECKPOINTS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path)
    assert_one_line(caught, tmp_path / CHECKPOINTS)


def test_a_checkpoint_with_damaged_metrics_is_named(tmp_path):
    metrics = tmp_path / "checkpoints/3/metrics/metrics"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("{")
    with pytest.raises(CheckpointError, match=r"metrics: is damaged; remove .*checkpoints/3 "):
        Checkpoints(tmp_path, read_only=True)
