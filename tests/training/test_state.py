"""The optimizer schedules, clips and accumulates as configured; the seed decides the initial state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqvae_jax.config import PRESETS, Config, ModelConfig, TrainingConfig
from vqvae_jax.training.state import create_train_state, init_variables, learning_rate_schedule, make_optimizer

MODEL = ModelConfig(image_size=(16, 16), hidden_channels=8, embedding_dim=4, num_embeddings=16, residual_blocks=0)


def updates(config, steps_per_epoch, gradients):
    """What the optimizer makes of these gradients, one step after another, and its last state."""
    optimizer = make_optimizer(config, steps_per_epoch)
    state = optimizer.init(gradients[0])
    found = []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state)
        found.append(update)
    return found, state


def test_learning_rate_halves_every_20_epochs():
    """Adam's update for a constant gradient is the learning rate."""
    config = Config(training=TrainingConfig(learning_rate=1e-2))
    expected = np.repeat([1e-2, 5e-3, 2.5e-3], 40)  # 20 epochs of 2 steps each
    schedule = learning_rate_schedule(config, steps_per_epoch=2)
    np.testing.assert_allclose([schedule(step) for step in range(120)], expected, rtol=1e-6)
    found, _ = updates(config, 2, [np.float32([0.5])] * 120)
    np.testing.assert_allclose(np.ravel(found), -expected, rtol=1e-4)


@pytest.mark.parametrize(("width", "expected"), [(256, 3e-4), (64, 1.2e-3), (32, 2.4e-3)])
def test_the_rate_auto_grows_as_the_width_shrinks(width, expected):
    config = Config(model=ModelConfig(hidden_channels=width), training=TrainingConfig(learning_rate="auto"))
    found, _ = updates(config, 2, [np.float32([0.5])])
    np.testing.assert_allclose(found[0], -expected, rtol=1e-4)


def test_a_cosine_rises_and_falls():
    config = Config(training=TrainingConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=4, epochs=4))
    schedule = learning_rate_schedule(config, steps_per_epoch=6)
    found = [float(schedule(step)) for step in range(25)]
    rising = 1e-2 * np.arange(4) / 4
    falling = 1e-2 * (1 + np.cos(np.pi * np.arange(21) / 20)) / 2
    np.testing.assert_allclose(found, [*rising, *falling], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("clip", "norm", "expected"), [(1.0, 50.0, 1.0), (1.0, 0.5, 0.5), (0.0, 50.0, 50.0)])
def test_clipping_bounds_the_global_norm(clip, norm, expected):
    """After one step Adam's first moment is a tenth of the gradient it was given."""
    gradient = {"a": np.float32([0.6 * norm]), "b": np.float32([0, 0.8 * norm])}
    _, state = updates(Config(training=TrainingConfig(gradient_clip=clip)), 1, [gradient])
    given = jax.tree.map(lambda moment: 10 * moment, optax.tree.get(state, "mu"))
    np.testing.assert_allclose(optax.tree.norm(given), expected, rtol=1e-5)


def test_accumulated_gradients_count_as_one_step_of_their_mean():
    """Parts bring nothing; each last one brings what the mean, then clipped, brings, at the batch's learning rate."""
    settings = TrainingConfig(learning_rate=1e-2, schedule="cosine", epochs=4, batch_size=12, accumulate=3)
    config, whole = Config(training=settings), Config(training=dataclasses.replace(settings, accumulate=1))
    gradients = np.random.default_rng(0).standard_normal((18, 5)) * np.geomspace(0.1, 3, 18)[:, None]
    gradients = list(np.float32(gradients))
    found, state = updates(config, 2, gradients)
    means = [np.mean(gradients[start : start + 3], axis=0) for start in range(0, 18, 3)]
    assert min(map(np.linalg.norm, means)) < 0.3 and max(map(np.linalg.norm, means)) > 1
    expected, once = updates(whole, 2, means)
    np.testing.assert_allclose(found[2::3], expected, rtol=1e-4)
    np.testing.assert_allclose(optax.tree.get(state, "mu"), optax.tree.get(once, "mu"), rtol=1e-4)
    assert not np.any(found[0::3]) and not np.any(found[1::3])


@pytest.mark.slow
def test_the_seed_decides_the_initial_state():
    def parameters(seed):
        config = Config(model=MODEL, training=TrainingConfig(seed=seed))
        return jax.device_get(create_train_state(config, steps_per_epoch=10).params)

    first = parameters(0)
    jax.tree.map(np.testing.assert_array_equal, parameters(0), first)
    other = parameters(1)["encoder"]["down1"]["kernel"]
    assert np.all(other != first["encoder"]["down1"]["kernel"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_built(preset):
    """In shapes alone: their optimizers too."""
    config = PRESETS[preset]
    optimizer = make_optimizer(config, steps_per_epoch=10)
    params = jax.eval_shape(lambda: init_variables(config.model, jax.random.key(0)))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    state = jax.eval_shape(optimizer.init, params)
    update, after = jax.eval_shape(optimizer.update, params, state, params)
    assert (update, after) == (params, state)
