"""Every option, alone and with others, in a model: it trains, goes on after a resume, and is shared by devices.

Run as a script, this file quantizes on 2 and on 4 devices and writes what came of it (see ``on_devices``).
"""

import dataclasses
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax import training
from vqvae_jax.checkpoint import Checkpoints
from vqvae_jax.config import Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.models.estimators import rotation_trick, straight_through
from vqvae_jax.models.quantizer import CODEBOOK
from vqvae_jax.models.vqvae import make_quantizer

pytestmark = pytest.mark.usefixtures("compile_fast")

D, K = 6, 16
EMA = {"codebook_update": "ema"}
COSINE = {"cosine_codes": True}
PROJECTION = {"code_dim": 3}
ENTROPY = {"entropy_weight": 0.1}
ROTATION = {"gradient_estimator": "rotation"}
OPTIONS = {
    "cosine": COSINE,
    "projection": PROJECTION,
    "entropy": ENTROPY,
    "rotation": ROTATION,
    "fsq": {"quantizer": "fsq", "fsq_levels": (5, 4)},
    "all with a gradient": COSINE | PROJECTION | ENTROPY | ROTATION,
    "averages alone": EMA | {"codebook_init": "random", "revive_below": 0.0},
    "all with averages": EMA | COSINE | PROJECTION | ENTROPY | ROTATION,
}

LATENTS, COTANGENT = np.random.default_rng(1).standard_normal((2, 64, D)).astype(np.float32)
LATENTS *= np.linspace(0.2, 2, 64, dtype=np.float32)[:, None]  # each device's share has other statistics
SHARED = ["entropy", "fsq", "all with a gradient", "all with averages"]
"""Options compared over devices: those that gather something, and the rest among all."""


def config(option, **fields):
    sizes = {"image_size": (16, 16), "hidden_channels": 8, "embedding_dim": D, "num_embeddings": K}
    return Config(
        model=ModelConfig(**sizes, residual_blocks=0, **OPTIONS[option]),
        loss=LossConfig(perceptual_weight=0.0),
        training=TrainingConfig(batch_size=8, learning_rate=3e-3, remat="none", **fields),
    )


def batch(step):
    images = np.random.default_rng(step).random((8, 16, 16, 1), np.float32)
    return training.split_over_devices(images)


def assert_identical(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "all with a gradient"])
def test_trains_and_goes_on_after_a_resume(option, tmp_path):
    """One step learns; the next is bit for bit the same from a checkpoint, into a state of zeros."""
    run = config(option)
    step = training.make_train_step(run)
    initial = jax.device_get(training.create_train_state(run, steps_per_epoch=10))
    state, metrics = step(training.replicate(jax.tree.map(jnp.array, initial)), batch(0), None)

    assert np.isfinite(metrics.losses.total)
    assert metrics.counts.shape == (1, run.model.num_codes)
    assert metrics.counts.sum() == 8 * 4 * 4
    assert np.count_nonzero(metrics.counts) > 1
    for place in (("params", "quantizer"), ("params", "encoder", "conv3", "kernel"), (CODEBOOK,)):
        old, new = initial.variables, state.variables
        for name in place:
            old, new = old.get(name, {}), new.get(name, {})
        for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert np.any(before != after), place

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {}, 0.5)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, initial))
    checkpoints.close()
    straight, straight_metrics = step(state, batch(1), None)
    resumed, resumed_metrics = step(training.replicate(restored), batch(1), None)
    assert resumed.step == 2
    assert_identical(resumed.variables, straight.variables)
    assert_identical(resumed_metrics, straight_metrics)


def test_every_count_is_of_the_codes_there_are():
    """Without a codebook K is not num_embeddings: also where a batch is taken in parts, and in evaluation."""
    run = config("fsq", accumulate=2)
    assert run.model.num_codes != run.model.num_embeddings
    state = training.replicate(training.create_train_state(run, steps_per_epoch=10))
    state, metrics = training.make_train_step(run)(state, batch(0), None)
    evaluated = training.make_eval_step(run)(state.variables, batch(0), np.ones((1, 8), np.float32))
    for counts in (metrics.counts, evaluated.counts):
        assert counts.shape == (1, run.model.num_codes)
        assert counts.sum() == 8 * 4 * 4


@pytest.mark.parametrize("option", OPTIONS)
def test_codes_alone_give_what_the_decoder_is_given(option):
    """What is stored of an image is its codes."""
    quantizer, variables = make_quantizer(config(option).model), running(option)
    found = jax.jit(quantizer.apply)(variables, LATENTS)
    assert len(np.unique(found.indices)) > K // 2
    assert found.quantized.shape == LATENTS.shape
    vectors = quantizer.apply(variables, found.indices, method="lookup")
    np.testing.assert_allclose(vectors, found.quantized, rtol=1e-5, atol=1e-6)


def test_each_field_reaches_the_quantizer():
    fields = {"entropy_weight": 0.3, "entropy_temperature": 0.7, "commitment_cost": 0.6, "ema_decay": 0.8}
    fields |= {"codebook_init": "random", "revive_below": 0.2}
    for update in ("gradient", "ema"):
        model = dataclasses.replace(config("cosine").model, **fields, codebook_update=update)
        quantizer = make_quantizer(model, "devices")
        found = {
            name: getattr(quantizer, name) for name in ("entropy_weight", "entropy_temperature", "commitment_cost")
        }
        assert found == {name: fields[name] for name in found}
        assert (quantizer.cosine, quantizer.axis_name) == (True, "devices")
        if update == "ema":
            assert (quantizer.decay, quantizer.kmeans, quantizer.revive_below) == (0.8, False, 0.2)
        projected = make_quantizer(dataclasses.replace(model, code_dim=3), "devices")
        assert projected.quantizer == quantizer.copy(embedding_dim=3)
    assert make_quantizer(config("rotation").model).estimator is rotation_trick
    assert make_quantizer(config("entropy").model).estimator is straight_through
    assert make_quantizer(config("fsq").model).quantizer.levels == (5, 4)


# Several devices: each has some of the latents, and together they must do what one does with all.


def running(option):
    """Variables of a quantizer under way, with codes among the latents, of which no latent is a tie."""
    rng = np.random.default_rng(0)
    quantizer = make_quantizer(config(option).model)
    variables = jax.device_get(quantizer.init(jax.random.key(0), jnp.zeros((1, D))))
    for path, leaf in jax.tree.leaves_with_path(variables):
        if path[-1].key == "embedding":
            codes = rng.standard_normal(leaf.shape).astype(np.float32)
            if "cosine_codes" in OPTIONS[option]:
                codes /= np.linalg.norm(codes, axis=1, keepdims=True)
            place = variables
            for key in path[:-1]:
                place = place[key.key]
            place["embedding"] = codes
            if path[0].key == CODEBOOK:
                place |= {"sums": codes}
                if "started" in place:
                    place["started"] = np.ones((), bool)
    return variables


def gradients(option, axis_name, mean):
    """A function of (variables, latents, cotangent): gradients of a loss, counts, and the new codebook.

    ``mean`` averages over devices; the loss is a mean over latents.
    """
    quantizer = make_quantizer(config(option).model, axis_name)

    def loss(params, latents, variables, cotangent):
        output, state = quantizer.apply(
            variables | {"params": params},
            latents,
            train=True,
            mutable=[CODEBOOK],
            rngs={CODEBOOK: jax.random.key(1)},
        )
        return output.loss + jnp.mean(output.quantized * cotangent), (output, state)

    def both(variables, latents, cotangent):
        params = variables.get("params", {})
        found, (output, state) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, latents, variables, cotangent)
        shared = mean((found[0], output.loss, output.entropy_loss, output.counts))
        return {"shared": shared, "codebook": state, "latents": found[1], "indices": output.indices}

    return both


def on_devices():
    """What ``gradients`` gives on 2 and on 4 devices, by option; each result with its device axis."""

    def mean(tree):
        return jax.lax.pmean(tree, training.AXIS)

    found = {}
    for devices in (2, 4):
        for option in SHARED:
            chosen = jax.devices()[:devices]
            step = jax.pmap(gradients(option, training.AXIS, mean), training.AXIS, in_axes=(None, 0, 0), devices=chosen)
            latents, cotangent = (x.reshape(devices, -1, D) for x in (LATENTS, COTANGENT))
            found[option, devices] = jax.device_get(step(running(option), latents, cotangent))
    return found


@pytest.fixture(scope="module")
def by_devices(tmp_path_factory):
    """``on_devices`` of a process with 4 devices."""
    path = tmp_path_factory.mktemp("devices") / "found"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True)
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("option", SHARED)
def test_devices_together_do_what_one_does(by_devices, option, devices):
    """Gradients, losses and codebook of one device, which takes no means over any axis, are those of several."""
    many = by_devices[option, devices]
    one = jax.jit(gradients(option, None, lambda tree: tree))(running(option), LATENTS, COTANGENT)
    assert len(np.unique(one["indices"])) > K // 2

    def assert_close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    np.testing.assert_array_equal(many["indices"].reshape(-1), one["indices"])
    assert_close(many["latents"].reshape(-1, D) / devices, one["latents"])
    for name in ("shared", "codebook"):
        for found in jax.tree.leaves(many[name]):
            np.testing.assert_array_equal(found, np.repeat(found[:1], devices, axis=0))
    *shared, counts = many["shared"]
    *expected, expected_counts = one["shared"]
    jax.tree.map(
        lambda a, b: assert_close(a[0], b), (tuple(shared), many["codebook"]), (tuple(expected), one["codebook"])
    )
    np.testing.assert_array_equal(counts[0] * devices, expected_counts)


def test_entropy_needs_the_latents_of_all_devices():
    """The test above could not fail if each device's share had the entropy of all."""
    model = dataclasses.replace(config("entropy").model, entropy_weight=1.0)
    quantizer = make_quantizer(model)
    apply = jax.jit(quantizer.apply)
    halves = [apply(running("entropy"), half).entropy_loss for half in np.split(LATENTS, 2)]
    whole = apply(running("entropy"), LATENTS).entropy_loss
    assert whole < np.mean(halves) - 0.01


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(on_devices(), file)
