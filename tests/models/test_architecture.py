"""Each option of the network trains, is saved and restored, and makes the shapes and codes that it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax import training
from vqvae_jax.checkpoint import Checkpoints
from vqvae_jax.config import Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.models.quantizer import CODEBOOK

OPTIONS = {
    "group norm": {"norm": "group"},
    "group norm, ema": {"norm": "group", "codebook_update": "ema"},
}
AVERAGED = ("group norm", "group norm, ema")
"""Options that are trained with moving averages of the weights."""


@pytest.fixture(autouse=True, scope="module")
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(**model):
    sizes = {"image_size": (32, 16), "hidden_channels": 8, "embedding_dim": 4, "num_embeddings": 16}
    return Config(
        model=ModelConfig(**{**sizes, "residual_blocks": 1, **model}),
        loss=LossConfig(perceptual_weight=0),
        training=TrainingConfig(batch_size=4, learning_rate=3e-3),
    )


def batch(seed, run):
    return np.random.default_rng(seed).random((1, 4, *run.model.image_size, 1), np.float32)


def assert_identical(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("option", OPTIONS)
def test_trains_and_goes_on_after_a_resume(option, tmp_path):
    """Steps move every kernel and scale; the next is bit for bit the same from a checkpoint, into a state of zeros."""
    run = config(**OPTIONS[option])
    if option in AVERAGED:
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, average_decay=0.9))
    step = training.make_train_step(run)
    initial = jax.device_get(training.create_train_state(run, steps_per_epoch=10))
    state = training.replicate(jax.tree.map(jnp.array, initial))
    for number in range(2):  # attention's projections have no gradient until gamma has moved
        state, metrics = step(state, batch(number, run), None)
    assert np.isfinite(metrics.losses.total)
    for (path, old), new in zip(jax.tree.leaves_with_path(initial.params), jax.tree.leaves(state.params), strict=True):
        # Norms and softmax leave some biases without effect.
        assert path[-1].key == "bias" or np.any(old != new), jax.tree_util.keystr(path)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {}, 0.5)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, initial))
    evaluated, _ = checkpoints.restore_variables(initial.evaluated)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(initial)
    assert_identical(evaluated, state.evaluated)
    straight, _ = step(state, batch(2, run), None)
    resumed, _ = step(training.replicate(restored), batch(2, run), None)
    assert_identical(resumed, straight)


@pytest.mark.parametrize(("update", "kept"), [("gradient", []), ("ema", [CODEBOOK])])
def test_group_norm_keeps_no_statistics(update, kept):
    run = config(norm="group", codebook_update=update)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, average_decay=0.9))
    state = jax.eval_shape(lambda: training.create_train_state(run, 10))
    assert list(state.model_state) == kept
    assert list(state.average) == ["params"]
