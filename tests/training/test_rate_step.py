"""Model and prior trained together: the rate is the soft assignment's cross-entropy, and the codes stay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.config import Config, LossConfig, ModelConfig, PriorConfig, TrainingConfig
from vqvae_jax.models.quantizer import squared_distances
from vqvae_jax.training import rate_step
from vqvae_jax.training.prior_step import codebook_of, create_prior_state
from vqvae_jax.training.state import RateState, create_train_state
from vqvae_jax.training.step import replicate

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = ModelConfig(
    image_size=(32, 16),
    hidden_channels=8,
    embedding_dim=4,
    num_embeddings=16,
    residual_blocks=0,
    codebook_update="ema",
    attention=False,
)
PRIOR = PriorConfig(batch_size=8, channels=8, blocks=1, neighbours=2)
STEPS = 30


def config_of(update="ema", weight=1.0):
    return Config(
        model=dataclasses.replace(MODEL, codebook_update=update),
        loss=LossConfig(perceptual_weight=0, rate_weight=weight),
        training=TrainingConfig(batch_size=8, learning_rate=3e-3, from_run="another"),
    )


def clips():
    rng = np.random.default_rng(0)
    present = np.arange(8)[:, None] >= np.array([1, 2])
    images = {"images": rng.random((8, 32, 16, 1)), "before": rng.random((8, 2, 32, 16, 1))}
    return {name: x[None].astype(np.float32) for name, x in images.items()} | {"present": present[None]}


def state_of(config):
    model = create_train_state(config, STEPS)
    if config.model.codebook_update == "ema":
        codes = jax.random.normal(jax.random.key(3), (16, 4)) / 4
        kept = {
            **model.model_state["ema"]["quantizer"],
            "codebook": codes,
            "sums": codes + 0,
            "started": jnp.ones((), bool),
        }
        model = model.replace(model_state={**model.model_state, "ema": {"quantizer": kept}})
    prior = create_prior_state(PRIOR, config.model, codebook_of(model.variables), STEPS)
    return replicate(RateState(model, prior))


def test_the_soft_cross_entropy_is_the_sum_over_all_codes():
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(2, 3, 4)), rng.normal(size=(7, 4))
    logits = rng.normal(size=(2, 3, 7))
    found = rate_step.soft_nats(*(jnp.asarray(x, jnp.float32) for x in (latents, codebook, logits)))
    distances = ((latents[..., None, :] - codebook) ** 2).sum(axis=-1)
    scale = rate_step.TEMPERATURE * distances.min(axis=-1).mean()
    for place in np.ndindex(2, 3):
        q = np.exp(-distances[place] / scale)
        p = np.exp(logits[place]) / np.exp(logits[place]).sum()
        assert found[place] == pytest.approx(-(q / q.sum() * np.log(p)).sum(), rel=1e-4)


def test_distances_are_those_of_numpy():
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.normal(size=(7, 4)).astype(np.float32)
    expected = ((latents[..., None, :] - codebook) ** 2).sum(axis=-1)
    np.testing.assert_allclose(squared_distances(latents, codebook), expected, rtol=1e-4, atol=1e-5)


def test_the_weight_rises_and_stays():
    weights = [float(rate_step.weight_at(config_of(weight=0.5), step, 30)) for step in (0, 5, 10, 29)]
    np.testing.assert_allclose(weights, [0, 0.25, 0.5, 0.5])


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_all_but_the_codes_move(update):
    config = config_of(update)
    step = rate_step.make_rate_train_step(config, PRIOR, STEPS)
    before = jax.device_get(state_of(config))
    state, _ = step(state_of(config), clips(), None)
    after, metrics = jax.device_get(step(state, clips(), None))  # in the first, the prior's rate is 0
    np.testing.assert_array_equal(codebook_of(before.variables), codebook_of(after.variables))
    for part in ("encoder", "decoder"):
        moved = jax.tree.map(lambda a, b: (a != b).any(), before.params[part], after.params[part])
        assert all(jax.tree.leaves(moved)), part
    assert (before.prior.params["out_kernel"] != after.prior.params["out_kernel"]).any()
    assert metrics.losses.rate > 0 and metrics.counts.sum() == 8 * 8 * 4


@pytest.mark.slow
def test_a_greater_weight_gives_fewer_bits():
    """And teaches the prior nothing of its own: after the first step with a weight above 0 it is the same."""
    spent, priors = {}, []
    for weight in (1e-6, 30.0):
        config = config_of(weight=weight)
        step, state, rates = rate_step.make_rate_train_step(config, PRIOR, STEPS), state_of(config), []
        for number in range(60):
            state, metrics = step(state, clips(), None)
            if number == 1:
                priors.append(jax.device_get(state.prior.params))
            rates.append(float(metrics.losses.rate))
        spent[weight] = np.mean(rates[-20:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *priors)
    assert spent[30.0] < 0.9 * spent[1e-6]  # 0.79 after 60 steps; 1 without the gradient of the rate
