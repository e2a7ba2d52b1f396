"""A step learns, counts and schedules as configured, and several devices do what one would do.

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

from vqvae_jax import training
from vqvae_jax.config import AugmentationConfig, Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.models import vgg16
from vqvae_jax.models.quantizer import CODEBOOK, EMAVectorQuantizer
from vqvae_jax.models.vqvae import VQVAE

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


@pytest.fixture(scope="module")
def initial():
    return jax.device_get(training.create_train_state(CONFIG, steps_per_epoch=10))


@pytest.fixture(scope="module")
def vgg():
    return training.load_vgg(CONFIG)


@pytest.fixture(scope="module")
def train_step():
    return training.make_train_step(CONFIG)


@pytest.fixture
def state(initial):
    """A state of its own for each test, since a step uses its buffers up."""
    return training.replicate(jax.tree.map(jnp.array, initial))


def run(step, state, vgg, steps, images=None):
    metrics = []
    for _ in range(steps):
        state, found = step(state, training.split_over_devices(batch() if images is None else images), vgg)
        metrics.append(found)
    return state, metrics


def test_the_loss_falls_and_every_parameter_moves(train_step, state, vgg, initial):
    after, metrics = run(train_step, state, training.replicate(vgg), 15)
    losses = [float(found.losses.total) for found in metrics]
    assert losses[-1] < 0.9 * losses[0]
    assert after.step == 15
    for (path, old), new in zip(jax.tree.leaves_with_path(initial.params), jax.tree.leaves(after.params), strict=True):
        assert np.any(old != new), jax.tree_util.keystr(path)


def test_metrics_are_those_of_the_batch(train_step, state, vgg, initial):
    """Recomputed from the model's output on the whole batch, without pmap or axis name."""
    _, (found,) = run(train_step, state, vgg, 1)
    output, _ = jax.jit(lambda v, x: VQVAE(MODEL).apply(v, x, train=True, mutable="batch_stats"))(
        initial.variables, batch()
    )
    features = jax.jit(vgg16.VGG16(("relu1_1",)).apply)
    difference = features(vgg, output.reconstruction)["relu1_1"]
    difference -= features(vgg, batch())["relu1_1"]
    l1, perceptual = np.abs(output.reconstruction - batch()).mean(), np.abs(difference).mean()
    np.testing.assert_allclose(found.losses.reconstruction, l1, rtol=1e-5)
    np.testing.assert_allclose(found.losses.perceptual, perceptual, rtol=1e-5)
    np.testing.assert_allclose(found.losses.quantizer, output.quantizer.loss, rtol=1e-5)
    np.testing.assert_allclose(found.losses.total, l1 + 0.1 * perceptual + output.quantizer.loss, rtol=1e-5)
    np.testing.assert_array_equal(found.counts, [np.bincount(np.ravel(output.quantizer.indices), minlength=16)])


OPTIONS = {
    "l2": LossConfig(reconstruction="l2", perceptual_weight=0),
    "charbonnier": LossConfig(reconstruction="charbonnier", perceptual_weight=0),
    "ssim": LossConfig(ssim_weight=0.5, perceptual_weight=0),
    "ms_ssim": LossConfig(ms_ssim_weight=0.5, perceptual_weight=0),
    "layers": LossConfig(perceptual_layers=("relu1_1", "relu2_1"), vgg_weights="random"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_model_learns_by_each_loss(option, state):
    """The total falls, and the part that the option brings in falls with it."""
    config = dataclasses.replace(CONFIG, loss=OPTIONS[option])
    vgg = training.replicate(training.load_vgg(config))
    _, metrics = run(training.make_train_step(config), state, vgg, 8)
    part = {"ssim": "ssim", "ms_ssim": "ms_ssim", "layers": "perceptual"}.get(option, "reconstruction")
    for name in ("total", part):
        values = [float(getattr(found.losses, name)) for found in metrics]
        assert np.isfinite(values).all()
        assert 0 < values[-1] < values[0], name
    off = {"ssim", "ms_ssim", "perceptual"} - {part}
    assert all(getattr(metrics[0].losses, name) == 0 for name in off)


def test_the_perceptual_part_is_the_mean_of_its_layers(state):
    """Recomputed from the model's output, for each layer by itself."""
    config = dataclasses.replace(CONFIG, loss=OPTIONS["layers"])
    vgg = training.load_vgg(config)
    loss = jax.vmap(training.make_loss(config), (None, None, 0, None), axis_name=training.AXIS)
    parts = jax.jit(loss)(state.params, state, batch()[None], vgg)[1][0]
    output, _ = jax.jit(lambda v, x: VQVAE(MODEL).apply(v, x, train=True, mutable="batch_stats"))(
        state.variables, batch()
    )
    features = jax.jit(vgg16.VGG16(("relu1_1", "relu2_1")).apply)
    found, target = (features(vgg, x) for x in (output.reconstruction, batch()))
    each = [np.abs(found[name] - target[name]).mean() for name in ("relu1_1", "relu2_1")]
    assert not np.isclose(*each, rtol=0.01)
    np.testing.assert_allclose(parts.perceptual[0], np.mean(each), rtol=1e-4)


@pytest.mark.parametrize("name", ["ssim_weight", "ms_ssim_weight"])
def test_images_too_small_for_a_similarity_are_refused_by_flag(name):
    model = dataclasses.replace(MODEL, image_size=(32, 4))
    config = dataclasses.replace(CONFIG, model=model, loss=LossConfig(**{name: 0.5}))
    with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')} with --image-size 32 4: .* 7 pixels"):
        training.make_loss(config)


def test_vgg_is_used_but_not_trained(train_step, state, vgg):
    before = jax.device_get(vgg)
    after, metrics = run(train_step, state, vgg, 2)
    assert all(found.losses.perceptual > 0 for found in metrics)
    assert set(after.params) == {"encoder", "quantizer", "decoder"}
    jax.tree.map(np.testing.assert_array_equal, vgg, before)


def test_no_perceptual_weight_needs_no_vgg():
    config = dataclasses.replace(CONFIG, loss=LossConfig(perceptual_weight=0.0))
    assert training.load_vgg(config) is None


def test_steps_are_compiled_once(state, vgg, caplog):
    """From a replicated state on; one that lies on the first device alone would be compiled for again."""

    def compilations():
        return sum(record.message.startswith("Compiling") for record in caplog.records)

    step, vgg = training.make_train_step(CONFIG), training.replicate(vgg)
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
    return training.replicate(own.replace(tx=sgd, opt_state=sgd.init(own.params)))


def test_accumulated_parts_are_one_batch(initial, vgg):
    """Halves of the same images have one batch's statistics, so that nothing differs."""
    images = np.tile(batch()[:4], (2, 1, 1, 1))
    found = [
        run(training.make_train_step(changed(accumulate=parts)), sgd_state(initial), vgg, 2, images) for parts in (1, 2)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *(each[1] for each in found))
    params = [each[0].params for each in found]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *params)
    assert found[1][0].step == 2


def test_parts_hold_the_same_images_on_any_number_of_devices(monkeypatch):
    """Images are dealt to devices after the batch was cut; part k is the k-th stretch of the batch."""
    seen = []
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)

    def spy(function, in_axes, out_axes, donate=()):
        def called(*arguments):
            if len(arguments) == 5:
                seen.append(np.ravel(arguments[2]))
                return arguments[0], arguments[1]
            return arguments[0], None

        return called

    monkeypatch.setattr(training, "_pmap", spy)
    step = training.make_train_step(changed(accumulate=2))
    step("state", training.split_over_devices(np.arange(8)[:, None, None, None]), None)
    np.testing.assert_array_equal(seen, [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_accumulated_gradients_are_the_mean_of_the_parts(initial, vgg):
    whole = batch()
    step = training.make_train_step(changed(batch_size=4))
    halves = [run(step, sgd_state(initial), vgg, 1, half) for half in (whole[:4], whole[4:])]
    together, (metrics,) = run(training.make_train_step(changed(accumulate=2)), sgd_state(initial), vgg, 1, whole)

    def assert_mean(found, first, second):
        np.testing.assert_allclose(found, (first + second) / 2, rtol=1e-4, atol=1e-6)

    jax.tree.map(assert_mean, together.params, *(state.params for state, _ in halves))
    jax.tree.map(assert_mean, metrics.losses, *(found.losses for _, (found,) in halves))
    np.testing.assert_array_equal(metrics.counts, sum(found.counts for _, (found,) in halves))


def test_remat_changes_memory_and_nothing_else(initial, vgg):
    found, memory = {}, []
    for remat in ("none", "cheap", "full"):
        step = training.make_train_step(changed(remat=remat))
        images = training.split_over_devices(batch())
        memory.append(step.lower(sgd_state(initial), images, vgg).compile().memory_analysis().temp_size_in_bytes)
        state, metrics = step(sgd_state(initial), images, vgg)
        found[remat] = state.params, state.model_state, metrics
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    for remat in ("cheap", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[remat], found["none"])


def test_the_seed_decides_the_initial_state(initial):
    def parameters(seed):
        config = dataclasses.replace(CONFIG, training=TrainingConfig(seed=seed))
        return jax.device_get(training.create_train_state(config, steps_per_epoch=10).params)

    jax.tree.map(np.testing.assert_array_equal, parameters(0), initial.params)
    other = parameters(1)["encoder"]["down1"]["down"]["conv"]["kernel"]
    assert np.all(other != initial.params["encoder"]["down1"]["down"]["conv"]["kernel"])


def updates(config, steps_per_epoch, gradients):
    """What the optimizer makes of these gradients, one step after another, and its last state."""
    optimizer = training.make_optimizer(config, steps_per_epoch)
    state = optimizer.init(gradients[0])
    found = []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state)
        found.append(update)
    return found, state


def test_learning_rate_halves_every_decay_epochs():
    """Adam's update for a constant gradient is the learning rate."""
    config = TrainingConfig(learning_rate=1e-2, learning_rate_decay=0.5, decay_epochs=2)
    expected = np.repeat([1e-2, 5e-3, 2.5e-3], 6)  # 2 epochs of 3 steps each
    schedule = training.learning_rate_schedule(config, steps_per_epoch=3)
    np.testing.assert_allclose([schedule(step) for step in range(18)], expected, rtol=1e-6)
    found, _ = updates(config, 3, [np.float32([0.5])] * 18)
    np.testing.assert_allclose(np.ravel(found), -expected, rtol=1e-4)


def test_a_cosine_rises_and_falls():
    config = TrainingConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=4, epochs=4)
    schedule = training.learning_rate_schedule(config, steps_per_epoch=6)
    found = [float(schedule(step)) for step in range(25)]
    rising = 1e-2 * np.arange(4) / 4
    falling = 1e-2 * (1 + np.cos(np.pi * np.arange(21) / 20)) / 2
    np.testing.assert_allclose(found, [*rising, *falling], rtol=1e-5, atol=1e-9)


def test_weight_decay_shrinks_kernels_alone():
    """With no gradient, AdamW multiplies what decays by 1 - learning_rate * weight_decay."""
    config = TrainingConfig(learning_rate=1e-2, weight_decay=0.5)
    optimizer = training.make_optimizer(config, 10)
    params = {
        "conv": {"kernel": np.ones(3, np.float32), "bias": np.ones(3, np.float32)},
        "embedding": np.ones(2, np.float32),
    }
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    found = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found["conv"]["kernel"], 1 - 1e-2 * 0.5, rtol=1e-6)
    assert np.all(found["conv"]["bias"] == 1) and np.all(found["embedding"] == 1)


def test_averages_follow_the_weights(vgg):
    config = changed(average_decay=0.3)
    state, steps = training.replicate(training.create_train_state(config, 10)), []
    expected = jax.device_get({"params": state.params, "batch_stats": state.model_state["batch_stats"]})
    step = training.make_train_step(config)
    for number in range(1, 9):
        state, _ = step(state, training.split_over_devices(batch()), vgg)
        decay = min(0.3, (1 + number) / (10 + number))
        now = jax.device_get({"params": state.params, "batch_stats": state.model_state["batch_stats"]})
        expected = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, expected, now)
        steps.append(decay)
    assert min(steps) < 0.3 == max(steps)
    found = jax.device_get(state.evaluated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    assert optax.tree.norm(jax.tree.map(np.subtract, found["params"], state.params)) > 1e-3


def test_augmentation_changes_what_is_seen_and_is_drawn_anew(initial, vgg):
    config = dataclasses.replace(CONFIG, augmentation=AugmentationConfig(rotation=20.0, gamma=0.5))
    step = training.make_train_step(config)
    _, (plain,) = run(training.make_train_step(CONFIG), sgd_state(initial), vgg, 1)
    losses = []
    for number in (0, 0, 1):
        state = sgd_state(initial).replace(step=jnp.int32(number))
        losses.append(float(run(step, training.replicate(state), vgg, 1)[1][0].losses.total))
    assert losses[0] == losses[1] != losses[2]
    assert float(plain.losses.total) not in losses


@pytest.mark.parametrize(("clip", "norm", "expected"), [(1.0, 50.0, 1.0), (1.0, 0.5, 0.5), (0.0, 50.0, 50.0)])
def test_clipping_bounds_the_global_norm(clip, norm, expected):
    """After one step Adam's first moment is a tenth of the gradient it was given."""
    gradient = {"a": np.float32([0.6 * norm]), "b": np.float32([0, 0.8 * norm])}
    _, state = updates(TrainingConfig(gradient_clip=clip), 1, [gradient])
    given = jax.tree.map(lambda moment: 10 * moment, optax.tree.get(state, "mu"))
    np.testing.assert_allclose(optax.tree.norm(given), expected, rtol=1e-5)


def test_evaluation_leaves_padded_images_out(initial):
    mask = np.float32([1, 1, 0, 1, 1, 1, 0, 0])
    step = training.make_eval_step(CONFIG)
    images, found = batch(), []
    for fill in (0.0, 1.0):
        images[mask == 0] = fill
        found.append(step(initial.variables, *map(training.split_over_devices, (images, mask))))
    (indices,) = found[0].indices
    indices = np.asarray(indices).reshape(8, -1)
    np.testing.assert_array_equal(found[0].counts, [np.bincount(np.ravel(indices[mask == 1]), minlength=16)])
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
        training.check_devices(size)
    training.check_devices(int(advice))


def test_a_batch_must_divide_over_its_parts_and_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"--batch-size 12 in 2 parts \(--accumulate\) .* 4 devices.* 16$"):
        training.check_devices(12, 2)
    training.check_devices(16, 2)


def on_devices():
    """Two SGD steps of the model, and an EMA quantizer, on all devices: what the tests below compare.

    SGD shows the gradients themselves, where Adam would hide their scale.
    """
    result = {"devices": jax.device_count()}
    state, vgg = training.create_train_state(CONFIG, steps_per_epoch=10), training.load_vgg(CONFIG)
    state = training.replicate(state.replace(tx=(sgd := optax.sgd(SGD_RATE)), opt_state=sgd.init(state.params)))
    step, vgg = training.make_train_step(CONFIG), training.replicate(vgg)
    result["states"] = [jax.device_get((state.params, state.model_state))]
    result["metrics"] = []
    for _ in range(2):
        state, metrics = step(state, training.split_over_devices(batch()), vgg)
        result["states"].append(jax.device_get((state.params, state.model_state)))
        result["metrics"].append(jax.device_get(metrics))
    result["ema"] = ema_on_devices()
    return result


def ema_on_devices():
    """The codebook after the k-means start and one more step, as every device has it: [devices, ...]."""
    quantizer = EMAVectorQuantizer(8, 4, axis_name=training.AXIS)
    variables = EMAVectorQuantizer(8, 4).init(jax.random.key(0), jnp.zeros((1, 4)))
    latents = np.random.default_rng(0).standard_normal((2, 64, 4)).astype(np.float32)

    def update(variables, latents):
        rngs = {CODEBOOK: jax.random.key(1)}
        return quantizer.apply(variables, latents, train=True, mutable=[CODEBOOK], rngs=rngs)[1]

    update = jax.pmap(update, axis_name=training.AXIS, in_axes=(None, 0))
    started = update(variables, training.split_over_devices(latents[0]))
    running = jax.tree.map(jnp.copy, variables)
    running[CODEBOOK]["embedding"] = jnp.asarray(latents[0, :8])
    running[CODEBOOK] |= {"sums": running[CODEBOOK]["embedding"], "started": jnp.ones((), bool)}
    return jax.device_get({"started": started, "running": update(running, training.split_over_devices(latents[1]))})


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


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_one_moving_codebook(by_devices, devices):
    """All have the same codes, also where they were drawn; and from the same codes, those that one would have."""
    one, many = by_devices[1]["ema"], by_devices[devices]["ema"]
    for found in jax.tree.leaves(many):
        np.testing.assert_array_equal(found, np.repeat(found[:1], devices, axis=0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b[0], rtol=1e-5, atol=1e-6), many["running"], one["running"]
    )


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(on_devices(), file)
