"""The adversary joins when it is told to, plays by VQGAN's rules, and equals PyTorch's game.

Run as a script, this file takes steps on all devices it finds and writes what came of them.
"""

import dataclasses
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqvae_jax import adversarial, torch_import, training
from vqvae_jax.checkpoint import Checkpoints
from vqvae_jax.config import Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = ModelConfig(image_size=(32, 16), hidden_channels=8, embedding_dim=4, num_embeddings=16, residual_blocks=0)
START = 2
LOSS = LossConfig(
    perceptual_weight=0,
    adversarial_weight=0.5,
    adversarial_start=START,
    discriminator_channels=8,
    discriminator_layers=1,
)
CONFIG = Config(
    model=MODEL, loss=LOSS, training=TrainingConfig(batch_size=8, learning_rate=3e-3, warmup_steps=2 * START)
)
SGD_RATE = 0.1


def with_loss(**fields):
    return dataclasses.replace(CONFIG, loss=dataclasses.replace(LOSS, **fields))


def with_training(**fields):
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **fields))


def batch():
    """Stripes of a few pixels, each image brighter than the one before; their reconstructions start out flat."""
    columns = np.sin(np.arange(16, dtype=np.float32))[None, None, :, None]
    images = 0.5 + 0.4 * columns * np.ones((8, 32, 1, 1), np.float32)
    return images * np.linspace(0.3, 1, 8, dtype=np.float32)[:, None, None, None]


@pytest.fixture(scope="module")
def initial():
    return jax.device_get(training.create_train_state(CONFIG, steps_per_epoch=10))


@pytest.fixture(scope="module")
def train_step():
    """Compiled once for Adam and once for SGD."""
    return training.make_train_step(CONFIG)


def own(state):
    """A copy to use up, since a step takes its state's buffers."""
    return training.replicate(jax.tree.map(jnp.array, state))


def with_sgd(state):
    """A state of which both players change by their gradients, times SGD_RATE."""
    sgd = optax.sgd(SGD_RATE)
    adversary = state.adversary and state.adversary.replace(tx=sgd, opt_state=sgd.init(state.adversary.params))
    return state.replace(tx=sgd, opt_state=sgd.init(state.params), adversary=adversary)


def run(step, state, steps, images=None):
    states, metrics = [], []
    images = batch() if images is None else images
    for _ in range(steps):
        state, found = step(state, training.split_over_devices(images), None)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


def assert_identical(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


def assert_close(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def moved(before, after):
    return [np.any(old != new) for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]


@pytest.fixture(scope="module")
def played(train_step, initial):
    """States and metrics of five steps; the discriminator joins in the third."""
    return run(train_step, own(initial), 5)


def test_without_weight_there_is_no_adversary(initial):
    """No state, nothing saved, nothing reported; the same model from the same seed either way."""
    state = training.create_train_state(with_loss(adversarial_weight=0.0), 10)
    assert state.adversary is None
    assert_identical(state.variables, initial.variables)
    found = jax.eval_shape(training.make_train_step(with_loss(adversarial_weight=0.0)), state, batch()[None], None)
    assert found[1].adversary is None
    assert jax.tree.structure(found[0]) == jax.tree.structure(state)


def test_until_it_joins_the_discriminator_stays_and_the_model_trains_as_without_it(played, initial):
    states, metrics = played
    plain = initial.replace(adversary=None)
    alone, expected = run(training.make_train_step(with_loss(adversarial_weight=0.0)), own(plain), START)
    for step in range(START):
        assert_identical(states[step].adversary, initial.adversary)
        assert metrics[step].adversary.weight == 0
        assert_close(metrics[step].losses, expected[step].losses)
        assert_close(states[step].params, alone[step].params, 1e-4)


def test_once_it_has_joined_both_players_move(played, initial):
    states, metrics = played
    assert all(moved(initial.adversary.params, states[START].adversary.params))
    assert states[-1].adversary.step == 5 - START
    for found in metrics[START:]:
        assert found.adversary.weight > 0
        parts, adversary = found.losses, found.adversary
        total = parts.reconstruction + parts.quantizer + adversary.weight * adversary.generator
        np.testing.assert_allclose(parts.total, total, rtol=1e-5)


def test_the_learning_rate_is_the_models_at_the_same_step(played):
    """Adam's first update is the learning rate: half of it where the discriminator joins half-way in the warm-up."""
    before, after = (played[0][step].adversary.params for step in (START - 1, START))
    largest = [np.abs(new - old).max() for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    np.testing.assert_allclose(largest, CONFIG.training.learning_rate / 2, rtol=0.01)


def test_it_learns_to_tell_fixed_fakes_from_reals(train_step, initial):
    """The model is put back after each step."""
    adversary, found = initial.adversary, []
    for _ in range(40):
        start = own(initial.replace(step=np.int32(START), adversary=adversary))
        (state,), (metrics,) = run(train_step, start, 1)
        adversary = state.adversary
        found.append(metrics.adversary)
    assert found[0].discriminator > 0.9
    assert found[-1].discriminator < 0.2
    assert found[-1].generator > 0.5 > found[0].generator  # the model's loss: how fake its images look


@pytest.fixture(scope="module")
def gradient():
    return gradient_of(CONFIG)


def gradient_of(config):
    """The gradients of both players from a state, with an axis of one device."""
    gradient = jax.vmap(training._make_gradient(config), (None, None, 0, None), axis_name=training.AXIS)
    return jax.jit(lambda state: gradient(state.params, state, batch()[None], None))


def test_the_models_gradient_pushes_towards_what_looks_real(gradient, initial):
    """A short way against what the adversary adds to the gradient, logits of the reconstructions are higher."""
    joined = initial.replace(step=np.int32(START))
    (alone, _), _, _, _ = gradient(initial)
    (together, _), (_, before), _, _ = gradient(joined)
    added = jax.tree.map(lambda a, b: a[0] - b[0], together, alone)
    size = 0.01 / optax.tree.norm(added)
    params = jax.tree.map(lambda value, gradient: value - size * gradient, joined.params, added)
    _, (_, after), _, _ = gradient(joined.replace(params=params))
    assert after.generator < before.generator - 1e-4


def test_the_adaptive_weight_is_the_ratio_of_norms_within_bounds():
    a, b = np.float32([[3, 0], [0, 4]]), np.float32([[0, 0.3], [0.4, 0]])
    np.testing.assert_allclose(adversarial.adaptive_weight(a, b), 5 / 0.5001, rtol=1e-6)
    assert adversarial.adaptive_weight(0 * a, b) == 0
    assert adversarial.adaptive_weight(a, 0 * b) == 1e4


def test_remat_changes_nothing(gradient, initial):
    joined = initial.replace(step=np.int32(START))
    assert_close(gradient_of(with_training(remat="full"))(joined)[:2], gradient(joined)[:2])


def test_accumulated_parts_are_one_batch(train_step, initial):
    """Halves of the same images have one batch's statistics and weight, so that nothing differs."""
    images, start = np.tile(batch()[:4], (2, 1, 1, 1)), with_sgd(initial.replace(step=np.int32(START)))
    one, one_metrics = run(train_step, own(start), 2, images)
    parts, parts_metrics = run(training.make_train_step(with_training(accumulate=2)), own(start), 2, images)
    assert_close(parts_metrics, one_metrics, 1e-4)
    assert_close(parts[-1].params, one[-1].params)
    assert_close(parts[-1].adversary.params, one[-1].adversary.params)


def test_a_resumed_state_goes_on_to_the_last_bit(tmp_path, train_step, played, initial):
    states, _ = played
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(own(states[3]), {}, 0.5)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, initial))
    evaluated, _ = checkpoints.restore_variables(initial.evaluated)  # for which no discriminator is built
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(initial)
    assert_identical(restored, states[3])
    assert_identical(evaluated, states[3].evaluated)
    assert_identical(run(train_step, own(restored), 1)[0][0], states[4])


def test_images_too_small_for_its_layers_are_refused_by_flag():
    with pytest.raises(ConfigError, match=r"^--discriminator-layers 3 with --image-size 32 16: .* 24 pixels a side"):
        training.create_train_state(with_loss(discriminator_layers=3), 10)
    jax.eval_shape(lambda: training.create_train_state(with_loss(discriminator_layers=2), 10))


@pytest.mark.parity
def test_both_players_gradients_and_the_weight_equal_pytorchs():
    """One batch, from the same parameters; PyTorch takes the weight's gradients at the last layer by autograd."""
    torch = pytest.importorskip("torch")
    import torch_reference as reference  # noqa: PLC0415  (imports torch)

    torch.manual_seed(3)
    theirs = reference.randomise(reference.VQVAE(hidden=16, dim=4, codes=16, channels_last=True)).train()
    judge = reference.PatchDiscriminator(8, 1)
    state, config = equal_state(theirs, reference.discriminator_params(judge))
    images = torch.from_numpy(batch().transpose(0, 3, 1, 2).copy())
    reconstruction, quantizer, _ = theirs(images)
    compared, generator = (reconstruction - images).abs().mean(), -judge(reconstruction).mean()
    last = theirs.decoder.conv3.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (compared, generator)]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    (compared + quantizer + weight.detach() * generator).backward()
    expected = [(name, value.grad) for name, value in theirs.named_parameters()]
    judge.zero_grad()
    fake, real = judge(reconstruction.detach()), judge(images)
    discriminator = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    discriminator.backward()

    (gradients, own_gradients), (_, found), _, _ = jax.device_get(gradient_of(config)(state))
    hinges = (found.generator[0], found.discriminator[0], found.weight[0])
    np.testing.assert_allclose(hinges, [x.item() for x in (generator, discriminator, weight)], rtol=1e-4)
    table = dict(torch_import._tensors(1, 16, 4, 16))
    for name, gradient in expected:
        if name.endswith("weight"):  # most biases are cancelled by the norms
            ours, target = gradients, table[name]
            for key in target.path[1:]:
                ours = ours[key]
            wanted = target.convert(gradient.numpy())
            np.testing.assert_allclose(ours[0], wanted, atol=1e-3 * np.abs(wanted).max(), err_msg=name)
    for module in judge.children():
        module.weight.data, module.bias.data = module.weight.grad, module.bias.grad
    wanted = reference.discriminator_params(judge)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-3 * np.abs(b).max()), own_gradients, wanted)


def equal_state(model, judge_params):
    """A state with the parameters of PyTorch's two players, where the discriminator has joined; and its config."""
    tensors = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    imported, variables = torch_import.convert(tensors)
    shape = dataclasses.replace(imported.model, image_size=MODEL.image_size, published_flatten=False)
    config = dataclasses.replace(with_loss(adversarial_start=0), model=shape)
    state = jax.eval_shape(lambda: training.create_train_state(config, 10))
    params = variables.pop("params")
    adversary = state.adversary.replace(params=judge_params)
    assert jax.tree.structure(adversary) == jax.tree.structure(state.adversary)
    state = state.replace(params=params, model_state=variables, adversary=adversary.replace(step=0, opt_state=()))
    return state.replace(step=0, opt_state=()), config


def on_devices(train_step, initial):
    """Three SGD steps of both players on all devices; the discriminator joins in the second."""
    states, metrics = run(train_step, own(with_sgd(initial.replace(step=np.int32(START - 1)))), 3)
    return {
        "devices": jax.device_count(),
        "states": [(state.params, state.adversary.params) for state in states],
        "metrics": [(found.losses, found.adversary) for found in metrics],
    }


def test_two_devices_take_the_steps_of_one(tmp_path, train_step, initial):
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, __file__, str(tmp_path / "two")], env=environment) as process:
        one = on_devices(train_step, initial)
    assert process.returncode == 0
    two = pickle.loads((tmp_path / "two").read_bytes())
    assert (one["devices"], two["devices"]) == (1, 2)
    assert_close(two["states"], one["states"])
    assert_close(two["metrics"], one["metrics"], 1e-4)
    assert one["metrics"][0][1].weight == 0 < one["metrics"][1][1].weight


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(on_devices(training.make_train_step(CONFIG), training.create_train_state(CONFIG, 10)), file)
