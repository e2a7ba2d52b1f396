"""A step learns, counts and accumulates as configured, and several devices do what one would do.

Run as a script, this file takes two steps on all devices it finds and writes what came of it (see ``on_devices``).
"""

import dataclasses
import logging
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqvae_jax.config import AugmentationConfig, Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.metrics import ssim
from vqvae_jax.models import quantizer, vgg16, vgg_weights
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime import compilation
from vqvae_jax.training.state import create_train_state, make_optimizer
from vqvae_jax.training.step import (
    check_devices,
    fitted_train_step,
    make_eval_step,
    make_train_step,
    replicate,
    split_over_devices,
)

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = ModelConfig(image_size=(32, 16), hidden_channels=8, embedding_dim=4, num_embeddings=16, residual_blocks=0)
CONFIG = Config(
    model=MODEL,
    loss=LossConfig(perceptual_layers=("relu1_1",), vgg_weights="random"),
    training=TrainingConfig(batch_size=8, learning_rate=3e-3),
)
SGD_RATE = 0.1
KINKS = 3e-4
"""Relative change of a gradient when rounding puts a few pixels on the other side of a kink, of L1 or a ReLU."""


def batch():
    """A global batch whose images grow brighter, so that each device's share has other statistics."""
    images = np.random.default_rng(0).random((8, *MODEL.image_size, 1), np.float32)
    return images * np.linspace(0.1, 1, 8, dtype=np.float32)[:, None, None, None]


def load_vgg(config):
    loss = config.loss
    return vgg_weights.load(loss.vgg_weights, *loss.perceptual_layers) if loss.perceptual_weight else None


@pytest.fixture(scope="module")
def initial():
    return jax.device_get(create_train_state(CONFIG, steps_per_epoch=10))


@pytest.fixture(scope="module")
def vgg():
    return replicate(load_vgg(CONFIG))


@pytest.fixture(scope="module")
def train_step():
    return make_train_step(CONFIG)


@pytest.fixture
def state(initial):
    """A state of its own for each test, since a step uses its buffers up."""
    return replicate(jax.tree.map(jnp.array, initial))


def run(step, state, vgg, steps, images=None):
    metrics = []
    for _ in range(steps):
        state, found = step(state, split_over_devices(batch() if images is None else images), vgg)
        metrics.append(found)
    return state, metrics


def test_the_loss_falls_and_every_parameter_moves(train_step, state, vgg, initial):
    after, metrics = run(train_step, state, vgg, 15)
    losses = [float(found.losses.total) for found in metrics]
    assert losses[-1] < 0.9 * losses[0]
    assert after.step == 15
    for (path, old), new in zip(jax.tree.leaves_with_path(initial.params), jax.tree.leaves(after.params), strict=True):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:  # it adds the same to every score of a query: softmax takes it away
            assert np.any(old != new), name


OPTIONS = {
    "published": CONFIG.loss,
    "l2": LossConfig(reconstruction="l2", perceptual_weight=0),
    "ssim": LossConfig(ssim_weight=0.5, perceptual_weight=0),
    "layers": LossConfig(perceptual_layers=("relu1_1", "relu2_1"), vgg_weights="random", perceptual_weight=3.0),
    "all": LossConfig(
        reconstruction="l2", perceptual_layers=("relu1_1",), vgg_weights="random", perceptual_weight=0.5, ssim_weight=2
    ),
}


def recomputed(config, variables, vgg):
    """Parts of the loss, and counts, from the model's output on the whole batch, without pmap or axis name."""
    apply = jax.jit(lambda variables, images: VQVAE(MODEL).apply(variables, images, train=True, mutable="batch_stats"))
    output, _ = apply(variables, batch())
    difference = output.reconstruction - batch()
    parts = {"reconstruction": np.mean(np.abs(difference) if config.reconstruction == "l1" else difference**2 / 0.05)}
    parts |= {"perceptual": 0.0, "quantizer": output.quantizer.loss, "ssim": 0.0}
    if config.perceptual_weight:
        features = jax.jit(vgg16.VGG16(config.perceptual_layers).apply)
        found, target = (features(vgg, images) for images in (output.reconstruction, batch()))
        each = [np.abs(found[name] - target[name]).mean() for name in config.perceptual_layers]
        assert len(each) == 1 or not np.isclose(*each, rtol=0.01)
        parts["perceptual"] = np.mean(each)
    if config.ssim_weight:
        parts["ssim"] = 1 - np.mean(ssim(output.reconstruction, batch()))
    return parts, np.bincount(np.ravel(output.quantizer.indices), minlength=16)


@pytest.mark.parametrize(
    "option", [name if name == "all" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_the_loss_is_the_weighted_sum_of_its_parts_and_falls(option, train_step, state, initial):
    """Each part is that of the model's output; the total falls, and the part that the option brings in with it."""
    config = dataclasses.replace(CONFIG, loss=OPTIONS[option])
    vgg = load_vgg(config)
    step = train_step if config == CONFIG else make_train_step(config)
    _, found = run(step, state, replicate(vgg), 8)
    parts, counts = recomputed(config.loss, initial.variables, vgg)
    first = found[0].losses
    for name, expected in parts.items():
        np.testing.assert_allclose(getattr(first, name), expected, rtol=1e-5, err_msg=name)
    weights = {"reconstruction": 1, "quantizer": 1, "perceptual": config.loss.perceptual_weight}
    weights["ssim"] = config.loss.ssim_weight
    total = sum(weights[name] * parts[name] for name in parts)
    np.testing.assert_allclose(first.total, total, rtol=1e-5)
    np.testing.assert_array_equal(found[0].counts, counts)
    for name in ("total", {"ssim": "ssim", "layers": "perceptual"}.get(option, "reconstruction")):
        values = [float(getattr(each.losses, name)) for each in found]
        assert np.isfinite(values).all()
        assert 0 < values[-1] < values[0], name


def test_images_too_small_for_ssim_are_refused_by_flag():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, image_size=(32, 4)))
    make_train_step(config)
    with pytest.raises(ConfigError, match=r"^--ssim-weight with --image-size 32 4: .* 7 pixels"):
        make_train_step(dataclasses.replace(config, loss=LossConfig(ssim_weight=0.5)))


def test_vgg_is_used_but_not_trained(train_step, state, vgg):
    before = jax.device_get(vgg)
    after, metrics = run(train_step, state, vgg, 2)
    assert all(found.losses.perceptual > 0 for found in metrics)
    assert set(after.params) == {"encoder", "quantizer", "decoder"}
    jax.tree.map(np.testing.assert_array_equal, vgg, before)


def test_steps_are_compiled_once(state, vgg, caplog):
    """From a replicated state on; one that lies on the first device alone would be compiled for again."""

    def compilations():
        return sum(record.message.startswith("Compiling") for record in caplog.records)

    step = make_train_step(CONFIG)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state, _ = run(step, state, vgg, 1)
        assert compilations() >= 1
        caplog.clear()
        run(step, state, vgg, 3)
        assert compilations() == 0


def changed(**fields):
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **fields))


def sgd_state(initial):
    """A state whose change in one step is the gradient, times SGD_RATE."""
    sgd, own = optax.sgd(SGD_RATE), jax.tree.map(jnp.array, initial)
    return replicate(own.replace(tx=sgd, opt_state=sgd.init(own.params)))


@pytest.mark.slow
def test_parameters_move_with_every_second_part_by_the_mean_gradient(monkeypatch):
    """Each part's gradient is that of a step on it alone, by a model that has seen the parts before it."""
    monkeypatch.setattr(quantizer, "KMEANS_STEPS", 1)  # quicker to compile
    config = changed(accumulate=2, gradient_clip=0.0, remat="none")
    config = dataclasses.replace(
        config, model=dataclasses.replace(MODEL, codebook_update="ema"), loss=LossConfig(perceptual_weight=0)
    )
    step, parts = make_train_step(config), np.split(batch(), 2)
    initial = jax.device_get(create_train_state(config, steps_per_epoch=10))
    once = dataclasses.replace(config.training, accumulate=1)
    optimizer = make_optimizer(dataclasses.replace(config, training=once), 10)
    fresh = initial.replace(tx=optimizer, opt_state=jax.device_get(jax.jit(optimizer.init)(initial.params)))

    gradients, alone = [], fresh
    for part in parts:
        after, _ = run(step, replicate(jax.tree.map(jnp.array, alone)), None, 1, part)
        after = jax.device_get(after)
        gradients.append(jax.tree.map(lambda moment: 10 * moment, optax.tree.get(after.opt_state, "mu")))
        alone = fresh.replace(model_state=after.model_state, step=after.step)
    mean = jax.tree.map(lambda *each: np.mean(each, axis=0), *gradients)

    first, _ = run(step, replicate(jax.tree.map(jnp.array, initial)), None, 1, parts[0])
    jax.tree.map(np.testing.assert_array_equal, first.params, initial.params)
    state, _ = run(step, first, None, 1, parts[1])
    assert state.step == 2

    def assert_close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    jax.tree.map(assert_close, optax.tree.get(state.opt_state, "mu"), jax.tree.map(lambda leaf: leaf / 10, mean))
    jax.tree.map(assert_close, state.model_state, alone.model_state)  # which moves with each part
    moves, _ = jax.jit(optimizer.update)(mean, fresh.opt_state)
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), initial.params)
    # Adam's first move is the learning rate towards the gradient's sign, which rounding decides where there is none.
    found, expected, gradient = (np.concatenate([*map(np.ravel, jax.tree.leaves(x))]) for x in (moved, moves, mean))
    surely = np.abs(gradient) > 1e-4
    assert surely.mean() > 0.5
    np.testing.assert_allclose(found[surely], expected[surely], rtol=1e-3)

    before = jax.device_get(state.params)
    third, _ = run(step, state, None, 1, parts[0])
    jax.tree.map(np.testing.assert_array_equal, third.params, before)


@pytest.mark.slow
def test_remat_changes_memory_and_nothing_else(initial, vgg):
    found, memory = {}, []
    for remat in ("none", "cheap", "full"):
        step = make_train_step(changed(remat=remat))
        images = split_over_devices(batch())
        state = sgd_state(initial)
        lowered = step.lower(state, images, vgg)
        program = lowered.compile(compiler_options=compilation.cpu_options())  # which lower forgets
        memory.append(program.memory_analysis().temp_size_in_bytes)
        state, metrics = program(state, images, vgg)
        found[remat] = state.params, state.model_state, metrics
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    for remat in ("cheap", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[remat], found["none"])


@pytest.mark.slow
def test_remat_auto_computes_again_only_what_does_not_fit(initial, vgg, monkeypatch):
    arguments = sgd_state(initial), split_over_devices(batch()), vgg
    needed = {}
    for remat in ("none", "cheap"):
        program, found = fitted_train_step(make_train_step, changed(remat=remat), *arguments)
        needed[remat] = compilation.bytes_needed(program)
        assert found == remat
    for there, expected in ((needed["none"], "none"), (needed["none"] - 1, "cheap"), (needed["cheap"] - 1, "full")):
        monkeypatch.setattr(compilation, "bytes_there", lambda there=there: there)
        program, found = fitted_train_step(make_train_step, changed(remat="auto"), *arguments)
        assert found == expected
    state, _ = program(*arguments)
    after, _ = make_train_step(changed(remat="none"))(sgd_state(initial), *arguments[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, after.params)


@pytest.mark.slow
def test_augmentation_changes_what_is_seen_and_is_drawn_anew(train_step, state, initial, vgg):
    config = dataclasses.replace(CONFIG, augmentation=AugmentationConfig(rotation=20.0, gamma=0.5))
    step = make_train_step(config)
    _, (plain,) = run(train_step, state, vgg, 1)
    losses = []
    for number in (0, 0, 1):
        state = sgd_state(initial).replace(step=jnp.int32(number))
        losses.append(float(run(step, replicate(state), vgg, 1)[1][0].losses.total))
    assert losses[0] == losses[1] != losses[2]
    assert float(plain.losses.total) not in losses


def test_evaluation_leaves_padded_images_out(initial):
    mask = np.float32([1, 1, 0, 1, 1, 1, 0, 0])
    step = make_eval_step(CONFIG)
    images, found = batch(), []
    for fill in (0.0, 1.0):
        images[mask == 0] = fill
        found.append(step(initial.variables, *map(split_over_devices, (images, mask))))
    indices = np.asarray(found[0].indices).reshape(8, -1)
    np.testing.assert_array_equal(found[0].counts, np.bincount(np.ravel(indices[mask == 1]), minlength=16))
    np.testing.assert_array_equal(found[1].counts, found[0].counts)
    assert found[0].counts.sum() == 5 * 8 * 4
    expected = jax.jit(VQVAE(MODEL).apply)(initial.variables, batch())
    np.testing.assert_array_equal(indices[mask == 1], np.reshape(expected.quantizer.indices, (8, -1))[mask == 1])
    reconstruction = np.reshape(found[0].reconstruction, (8, 32, 16, 1))
    np.testing.assert_allclose(reconstruction[mask == 1], expected.reconstruction[mask == 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "devices", "advice"), [(8, 3, "9"), (2, 4, "4"), (33, 8, "40")])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, size, devices, advice):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with pytest.raises(ConfigError, match=rf"--batch-size {size} .* {devices} devices.* {advice}$"):
        check_devices(size)
    check_devices(int(advice))


def test_a_batch_must_divide_over_its_parts_and_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"--batch-size 12 in 2 parts \(--accumulate\) .* 4 devices.* 16$"):
        check_devices(12, 2)
    check_devices(16, 2)


def on_devices():
    """Two SGD steps of the model on all devices: what the test below compares.

    SGD shows the gradients themselves, where Adam would hide their scale.
    """
    result = {"devices": jax.device_count()}
    state, vgg = create_train_state(CONFIG, steps_per_epoch=10), replicate(load_vgg(CONFIG))
    state = replicate(state.replace(tx=(sgd := optax.sgd(SGD_RATE)), opt_state=sgd.init(state.params)))
    step = make_train_step(CONFIG)
    result["states"] = [jax.device_get((state.params, state.model_state))]
    result["metrics"] = []
    for _ in range(2):
        state, metrics = step(state, split_over_devices(batch()), vgg)
        result["states"].append(jax.device_get((state.params, state.model_state)))
        result["metrics"].append(jax.device_get(metrics))
    return result


@pytest.fixture(scope="module")
def by_devices(tmp_path_factory):
    """``on_devices`` in processes with 1, 2 and 4 devices."""
    folder, processes = tmp_path_factory.mktemp("devices"), {}
    for devices in (1, 2, 4):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        processes[devices] = subprocess.Popen(
            [sys.executable, __file__, str(folder / str(devices))],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
    assert [process.wait() for process in processes.values()] == [0, 0, 0]
    found = {devices: pickle.loads((folder / str(devices)).read_bytes()) for devices in processes}
    assert all(found[devices]["devices"] == devices for devices in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_together_take_the_step_of_one(by_devices, devices):
    """Same losses, parameters, batch statistics and counts, since gradients pass through the statistics of all."""
    one, many = by_devices[1], by_devices[devices]

    def assert_close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    jax.tree.map(assert_close, many["states"], one["states"])
    for step in (0, 1):
        found, expected = many["metrics"][step], one["metrics"][step]
        jax.tree.map(assert_close, (found.losses, found.counts), (expected.losses, expected.counts))
        np.testing.assert_allclose(found.gradient_norm, expected.gradient_norm, rtol=KINKS)
        expected, found = (gradients(*result["states"][step : step + 2]) for result in (one, many))
        difference = jax.tree.map(np.subtract, found, expected)
        assert optax.tree.norm(difference) < KINKS * optax.tree.norm(expected)


def gradients(before, after):
    """The gradients of an SGD step between two states."""
    return jax.tree.map(lambda old, new: (old - new) / SGD_RATE, before[0], after[0])


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(on_devices(), file)
