"""Every option of the network, alone and with others, trains, and goes on after a resume to the last bit."""

import jax
import numpy as np
import pytest

from vqvae_jax.config import Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.models import quantizer
from vqvae_jax.models.quantizer import EMA
from vqvae_jax.training.checkpoint import Checkpoints, Progress
from vqvae_jax.training.state import create_train_state
from vqvae_jax.training.step import make_train_step, replicate, split_over_devices

pytestmark = pytest.mark.usefixtures("compile_fast")

K = 16
OPTIONS = {
    "no attention": {"attention": False},
    "projection": {"code_dim": 3},
    "averages": {"codebook_update": "ema"},
    "averages and projection": {"codebook_update": "ema", "code_dim": 3},
    "downsampling 8, pre-activation": {"downsampling": 8, "residual": "pre"},
    "all": {
        "downsampling": 16,
        "residual": "pre",
        "codebook_update": "ema",
        "code_dim": 3,
        "attention": False,
        "latent_norm": False,
    },
}
IN_PARTS = ("all",)
"""Trained in parts of batches, and saved between two parts of one."""


def config(option):
    sizes = {"image_size": (32, 16), "hidden_channels": 8, "embedding_dim": 6, "num_embeddings": K}
    accumulate = 2 if option in IN_PARTS else 1
    return Config(
        model=ModelConfig(**sizes, residual_blocks=1, **OPTIONS[option]),
        loss=LossConfig(perceptual_weight=0),
        training=TrainingConfig(batch_size=16, accumulate=accumulate, learning_rate=3e-3, remat="none"),
    )


def batch(seed):
    images = np.random.default_rng(seed).random((8, 32, 16, 1), np.float32)
    return split_over_devices(images)


def assert_identical(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_trains_and_goes_on_after_a_resume(option, tmp_path, monkeypatch):
    """Steps move every kernel, scale and code; the next is the same from a checkpoint, into a state of zeros."""
    monkeypatch.setattr(quantizer, "KMEANS_STEPS", 1)  # quicker to compile
    run = config(option)
    step = make_train_step(run)
    initial = jax.device_get(create_train_state(run, steps_per_epoch=10))
    state = replicate(jax.tree.map(np.copy, initial))
    for number in range(3):  # attention's projections have no gradient until gamma has moved
        state, metrics = step(state, batch(number), None)
        assert np.isfinite(metrics.losses.total)
        assert metrics.counts.shape == (K,)
        assert metrics.counts.sum() == 8 * 32 * 16 / run.model.downsampling**2
        assert np.count_nonzero(metrics.counts) > 1
    for collection in ("params", *([EMA] if run.model.codebook_update == "ema" else [])):
        before, after = (tree.variables[collection] for tree in (initial, jax.device_get(state)))
        for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
            # Norms and softmax leave some biases without effect.
            assert path[-1].key == "bias" or np.any(old != new), jax.tree_util.keystr(path)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, Progress(), 0.5)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.tree.map(np.zeros_like, initial))
    variables = checkpoints.restore_variables(initial.variables)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(initial)
    assert_identical(variables, state.variables)
    straight = step(state, batch(3), None)
    resumed = step(replicate(restored), batch(3), None)
    assert resumed[0].step == 4
    assert_identical(resumed, straight)
