"""Two levels of codes: what they are of, that both are learned and used, and that devices share them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vqvae_jax import evaluation, training
from vqvae_jax.checkpoint import Checkpoints
from vqvae_jax.config import Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.data import loader, nifti
from vqvae_jax.models import quantizer
from vqvae_jax.models.quantizer import CODEBOOK
from vqvae_jax.models.vqvae import VQVAE

pytestmark = pytest.mark.usefixtures("compile_fast")

K, D = 16, 4
SIZES = {"image_size": (32, 16), "hidden_channels": 8, "embedding_dim": D, "num_embeddings": K}
MODEL = ModelConfig(**SIZES, residual_blocks=1, levels=2)
BATCH = 4


def images(seed=0):
    """A batch whose images grow brighter, so that each half has other statistics."""
    found = np.random.default_rng(seed).random((BATCH, *MODEL.image_size, 1), np.float32)
    return found * np.linspace(0.2, 1, BATCH, dtype=np.float32)[:, None, None, None]


@functools.cache
def method(name, model=MODEL, **keywords):
    return jax.jit(functools.partial(VQVAE(model).apply, method=name, **keywords))


@functools.cache
def trained():
    """Variables as training might leave them, with each level's codes among its latents."""
    rng = np.random.default_rng(0)
    variables = jax.device_get(jax.jit(VQVAE(MODEL).init)(jax.random.key(0), images()))

    def disturb(path, leaf):
        noise = rng.random(leaf.shape) if path[-1].key == "var" else rng.standard_normal(leaf.shape)
        return leaf + 0.2 * noise.astype(np.float32)

    variables = jax.tree.map_with_path(disturb, variables)
    for level in ("top", "bottom"):  # the bottom's latents depend on the top's codes
        latents = run(variables)[1][level].reshape(-1, D)
        variables["params"]["quantizer"][level]["embedding"] = rng.choice(latents, K, replace=False)
    return variables


def run(variables):
    """The model's output for ``images()``, and each level's latents on the way."""
    found, kept = method("__call__", capture_intermediates=True, mutable="intermediates")(variables, images())
    within = kept["intermediates"]["quantizer"]
    return found, {level: np.asarray(within[f"latents_{level}"]["__call__"][0]) for level in ("bottom", "top")}


@pytest.mark.parametrize("downsampling", [4, 8])
def test_the_top_level_stands_for_twice_the_square(downsampling):
    model = VQVAE(dataclasses.replace(MODEL, image_size=(64, 48), downsampling=downsampling))
    found, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, 64, 48, 1)))
    codes = jax.eval_shape(functools.partial(model.apply, method="to_codes"), variables, jnp.zeros((2, 64, 48, 1)))
    bottom, top = ((2, 64 // square, 48 // square) for square in (downsampling, 2 * downsampling))
    assert [(level.shape, level.dtype) for level in codes] == [(bottom, jnp.int32), (top, jnp.int32)]
    assert [level.shape for level in found.indices] == [bottom, top]
    assert found.reconstruction.shape == (2, 64, 48, 1)
    assert found.quantizer.counts.shape == (2, K)


def test_each_level_has_its_nearest_codes_and_the_losses_add_up():
    """By NumPy from each level's latents; the straight-through output is what the codes alone give."""
    variables = trained()
    found, by_level = run(variables)
    loss = 0
    for level, (name, latents) in enumerate(by_level.items()):
        codes = variables["params"]["quantizer"][name]["embedding"]
        chosen = np.square(latents[..., None, :] - codes).sum(-1).argmin(-1)
        assert len(np.unique(chosen)) > K // 2
        np.testing.assert_array_equal(found.indices[level], chosen)
        np.testing.assert_array_equal(found.counts[level], np.bincount(chosen.ravel(), minlength=K))
        loss += (1 + MODEL.commitment_cost) * np.square(latents - codes[chosen]).mean()
    np.testing.assert_allclose(found.quantizer.loss, loss, rtol=1e-5)
    vectors = method("lookup")(variables, found.indices)
    np.testing.assert_allclose(vectors, found.quantizer.quantized, rtol=1e-5, atol=1e-6)


def test_codes_alone_give_the_reconstruction():
    whole, _ = run(trained())
    codes = method("to_codes")(trained(), images())
    jax.tree.map(np.testing.assert_array_equal, codes, whole.indices)
    decoded = method("from_codes")(trained(), codes)
    np.testing.assert_allclose(decoded, whole.reconstruction, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0, 1])
def test_the_image_depends_on_the_codes_of_both_levels(level):
    """On each: another code at one place changes pixels there, by more than rounding."""
    codes = [np.array(indices) for indices in method("to_codes")(trained(), images())]
    # Waited for: JAX may read the NumPy array only when it comes to it, changed by then.
    before = jax.block_until_ready(method("from_codes")(trained(), tuple(codes)))
    codes[level][0, 1, 1] = (codes[level][0, 1, 1] + 1) % K
    change = np.abs(method("from_codes")(trained(), tuple(codes)) - before)
    square = MODEL.downsampling * 2**level
    assert change[0, square : 2 * square, square : 2 * square].min() > 1e-5
    assert change[1:].max() == 0


def test_the_bottom_codes_depend_on_the_top_ones():
    """With the top's codes mirrored, the bottom's latents are others and its codes too; the top's stay the same."""
    variables, mirrored = trained(), jax.tree.map(np.copy, trained())
    mirrored["params"]["quantizer"]["decoder_top"]["conv"]["conv"]["kernel"] *= -1
    before, after = run(variables)[1], run(mirrored)[1]
    np.testing.assert_array_equal(before["top"], after["top"])
    assert np.abs(before["bottom"] - after["bottom"]).max() > 0.1
    (bottom, top), (other, same) = (method("to_codes")(values, images()) for values in (variables, mirrored))
    np.testing.assert_array_equal(top, same)
    assert np.any(bottom != other)


def test_gradients_reach_every_parameter():
    """But the key's bias, which softmax takes out."""

    def loss(params):
        found = VQVAE(MODEL).apply(trained() | {"params": params}, images())
        return jnp.mean(jnp.abs(found.reconstruction - images())) + found.quantizer.loss

    for path, gradient in jax.tree.leaves_with_path(jax.device_get(jax.jit(jax.grad(loss))(trained()["params"]))):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.any(gradient) or name.endswith("attention/key/bias"), name


@pytest.fixture
def short_start(monkeypatch):
    """Programs are compiled with fewer Lloyd iterations."""
    monkeypatch.setattr(quantizer, "KMEANS_STEPS", 1)


def test_both_levels_learn_and_go_on_after_a_resume(short_start, tmp_path):
    """With moving averages, in parts: every kernel, scale and codebook moves; the next step is bit for bit the same
    from a checkpoint."""
    options = {"codebook_update": "ema", "code_dim": 2, "norm": "group", "upsampling": "nearest", "residual_blocks": 0}
    in_parts = {"accumulate": 2, "remat": "full"}
    settings = Config(
        model=dataclasses.replace(MODEL, **options),
        loss=LossConfig(perceptual_weight=0),
        training=TrainingConfig(batch_size=BATCH, learning_rate=3e-3, **in_parts),
    )
    step = training.make_train_step(settings)
    initial = jax.device_get(training.create_train_state(settings, steps_per_epoch=10))
    state = training.replicate(jax.tree.map(jnp.array, initial))
    for number in range(2):  # attention's projections have no gradient until gamma has moved
        state, metrics = step(state, training.split_over_devices(images(number)), None)
    np.testing.assert_array_equal(metrics.counts.sum(axis=1), [BATCH * 8 * 4, BATCH * 4 * 2])
    assert np.isfinite(metrics.losses.total)
    for (path, old), new in zip(
        jax.tree.leaves_with_path(initial.variables), jax.tree.leaves(state.variables), strict=True
    ):
        # Norms and softmax leave some biases without effect.
        assert path[-1].key == "bias" or np.any(old != new), jax.tree_util.keystr(path)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {}, 0.5)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, initial))
    checkpoints.close()
    straight, resumed = (
        jax.device_get(step(training.replicate(before), training.split_over_devices(images(2)), None)[0])
        for before in (jax.tree.map(jnp.copy, restored), state)
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def test_devices_share_both_levels(short_start):
    """Gradients, statistics, codebooks and counts of two halves of a batch along one axis are those of the whole."""
    config = dataclasses.replace(MODEL, codebook_update="ema", entropy_weight=0.1, residual_blocks=0)
    model = VQVAE(config, axis_name="devices")
    variables = jax.device_get(jax.jit(VQVAE(config).init)(jax.random.key(0), images()))
    for level in ("bottom", "top"):  # under way, with no code to revive: what is drawn at random differs over devices
        variables[CODEBOOK]["quantizer"][level]["started"] = np.ones((), bool)
    features, cotangent = np.random.default_rng(0).standard_normal((2, BATCH, 8, 4, 8)).astype(np.float32)
    features *= np.linspace(0.2, 2, BATCH, dtype=np.float32)[:, None, None, None]

    def loss(params, features, cotangent):
        found, kept = model.apply(
            variables | {"params": params},
            features,
            train=True,
            method="quantize",
            mutable=["batch_stats", CODEBOOK],
            rngs={CODEBOOK: jax.random.key(0)},
        )
        return jnp.mean(found.quantized * cotangent) + found.loss, (kept, found.counts)

    step = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0, 0), axis_name="devices"))

    def on(devices):
        split = (x.reshape(devices, -1, *x.shape[1:]) for x in (features, cotangent))
        gradients, (kept, counts) = jax.device_get(step(variables["params"], *split))
        for leaf in jax.tree.leaves(kept):
            np.testing.assert_array_equal(leaf, np.repeat(leaf[:1], devices, axis=0))
        return jax.tree.map(functools.partial(np.mean, axis=0), (gradients, kept)), counts.sum(axis=0)

    (one, expected), (two, found) = on(1), on(2)
    np.testing.assert_array_equal(found, expected)
    assert (np.count_nonzero(expected, axis=1) > 2).all()
    for (path, a), b in zip(jax.tree.leaves_with_path(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_evaluation_adds_up_the_bits_of_both_levels():
    """From the codes of each slice by NumPy and SciPy, with a last batch that is padded."""
    settings = Config(model=MODEL, loss=LossConfig(perceptual_weight=0), training=TrainingConfig(batch_size=2))
    records = []
    for index in range(3):
        image = np.random.default_rng(index).uniform(0, 900, MODEL.image_size).astype(np.float32)
        record = {"image": image, "affine": np.eye(4), "file": b"a.nii", "case": b"a", "slice": index}
        records.append(record | {"range": np.float32(nifti.intensity_range(image, (0.5, 99.5)))})
    slices = loader.Slices(records, settings.data, MODEL.image_size)
    found = evaluation.Evaluator(settings, slices).run(trained())
    codes = method("to_codes")(trained(), np.stack([slices[index] for index in range(3)]))
    counts = [np.bincount(np.ravel(level), minlength=K) for level in codes]
    np.testing.assert_array_equal(found.counts, counts)
    assert found.codes_per_slice == (32, 8)
    summary, entropies = found.summary(), [stats.entropy(level, base=2) for level in counts]
    np.testing.assert_allclose(summary["bits_per_pixel"], (32 + 8) * 4 / 512)
    np.testing.assert_allclose(summary["bits_per_pixel_entropy"], np.dot((32, 8), entropies) / 512, rtol=1e-5)
    np.testing.assert_allclose(summary["perplexity"], np.mean(np.exp2(entropies)), rtol=1e-5)
    np.testing.assert_allclose(summary["perplexity_top"], np.exp2(entropies[1]), rtol=1e-5)
