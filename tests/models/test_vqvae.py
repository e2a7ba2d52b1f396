"""The network's shapes, size and range, and that its parts make up the whole."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax import training
from vqvae_jax.config import PRESETS, ModelConfig
from vqvae_jax.models import vqvae
from vqvae_jax.models.quantizer import CODEBOOK
from vqvae_jax.models.vqvae import VQVAE

pytestmark = pytest.mark.usefixtures("compile_fast")

TINY = ModelConfig(image_size=(32, 16), hidden_channels=8, embedding_dim=4, num_embeddings=16, residual_blocks=1)
UPDATES = ["gradient", "ema"]


def images(n=3, config=TINY):
    return np.random.default_rng(n).random((n, *config.image_size, 1), np.float32)


@functools.cache
def method(config, name="__call__", **keywords):
    return jax.jit(functools.partial(VQVAE(config).apply, method=name, **keywords))


@functools.cache
def trained(update="gradient"):
    """A model as training might leave it: gammas, norms and statistics disturbed, codes among the latents."""
    config = dataclasses.replace(TINY, codebook_update=update)
    rng = np.random.default_rng(0)
    variables = jax.device_get(jax.jit(VQVAE(config).init)(jax.random.key(0), images(1)))

    def disturb(path, leaf):
        noise = rng.random(leaf.shape) if path[-1].key == "var" else rng.standard_normal(leaf.shape)
        return leaf if leaf.dtype == bool else leaf + 0.2 * noise.astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(disturb, variables)
    latents = np.asarray(method(config, "encode")(variables, images(5))).reshape(-1, config.embedding_dim)
    place = variables["params" if update == "gradient" else CODEBOOK]["quantizer"]
    place["embedding"] = rng.choice(latents, config.num_embeddings, replace=False)
    return config, variables


@pytest.mark.parametrize("size", [(256, 128), (32, 16), (36, 20)])
def test_a_code_stands_for_4_by_4_pixels(size):
    config = dataclasses.replace(TINY, image_size=size)
    found, _ = jax.eval_shape(VQVAE(config).init_with_output, jax.random.key(0), images(2, config))
    codes = (2, size[0] // 4, size[1] // 4)
    assert found.reconstruction.shape == (2, *size, 1)
    assert found.quantizer.quantized.shape == (*codes, TINY.embedding_dim)
    assert found.quantizer.indices.shape == codes


def test_reference_network_has_the_published_size():
    variables = jax.eval_shape(VQVAE(PRESETS["reference"].model).init, jax.random.key(0), jnp.zeros((1, 256, 256, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 6_665_475


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_built(preset):
    state = jax.eval_shape(lambda: training.create_train_state(PRESETS[preset], steps_per_epoch=10))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("update", UPDATES)
def test_parts_make_up_the_whole(update):
    config, variables = trained(update)
    whole = method(config)(variables, images())
    latents = method(config, "encode")(variables, images())
    quantized = method(config, "quantize")(variables, latents)
    np.testing.assert_array_equal(quantized.indices, whole.quantizer.indices)
    assert len(np.unique(quantized.indices)) > 4
    decoded = method(config, "decode")(variables, quantized.quantized)
    np.testing.assert_allclose(decoded, whole.reconstruction, rtol=1e-5, atol=1e-6)
    looked_up = method(config, "lookup")(variables, quantized.indices)
    np.testing.assert_allclose(looked_up, quantized.quantized, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_decoded_images_lie_in_0_to_1(scale):
    config, variables = trained()
    vectors = scale * np.random.default_rng(0).standard_normal((1, 8, 4, TINY.embedding_dim)).astype(np.float32)
    found = np.asarray(method(config, "decode")(variables, vectors))
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.std() > 0.01


def test_inference_uses_the_running_statistics():
    """An image's reconstruction does not depend on its batch, but on the statistics; in training, on its batch."""
    config, variables = trained()
    batch = images()
    alone, among = (method(config)(variables, x).reconstruction[0] for x in (batch[:1], batch))
    np.testing.assert_allclose(alone, among, rtol=1e-5, atol=1e-6)

    shifted = variables | {"batch_stats": jax.tree.map(lambda x: x + 1, variables["batch_stats"])}
    assert np.abs(method(config)(shifted, batch).reconstruction[0] - among).max() > 1e-3

    train = method(config, train=True, mutable="batch_stats")
    (alone, _), (among, updated) = (train(variables, x) for x in (batch[:1], batch))
    assert np.abs(alone.reconstruction[0] - among.reconstruction[0]).max() > 1e-3
    for before, after in zip(*map(jax.tree.leaves, (variables["batch_stats"], updated["batch_stats"])), strict=True):
        assert np.all(before != after)


@pytest.mark.parametrize("update", UPDATES)
def test_only_training_changes_what_the_model_keeps(update):
    config, variables = trained(update)
    collections = [name for name in variables if name != "params"]
    assert collections == (["batch_stats"] if update == "gradient" else ["batch_stats", CODEBOOK])
    for train in (False, True):
        apply = method(config, train=train, mutable=tuple(collections))
        _, after = apply(variables, images(), rngs={CODEBOOK: jax.random.key(0)})
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), after, {name: variables[name] for name in after})
        assert all(jax.tree.leaves(same)) is not train


def test_latent_norm_is_a_choice():
    for latent_norm in (True, False):
        config = dataclasses.replace(TINY, latent_norm=latent_norm)
        params = jax.eval_shape(VQVAE(config).init, jax.random.key(0), images())["params"]
        assert ("norm3" in params["encoder"]) is latent_norm


def test_bfloat16_computes_in_bfloat16_and_chooses_in_float32():
    config, variables = trained()
    exact = method(config)(variables, images())
    half = dataclasses.replace(config, precision="bfloat16")
    initial = jax.eval_shape(VQVAE(half).init, jax.random.key(0), images())
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}

    latents = method(half, "encode")(variables, images())
    found = method(half)(variables, images())
    assert latents.dtype == jnp.bfloat16
    assert found.reconstruction.dtype == jnp.float32
    assert found.quantizer.loss.dtype == jnp.float32
    assert np.isfinite(found.quantizer.loss)

    codes = variables["params"]["quantizer"]["embedding"].astype(np.float64)
    distances = ((np.float64(latents)[..., None, :] - codes) ** 2).sum(-1)
    np.testing.assert_array_equal(method(half, "quantize")(variables, latents).indices, distances.argmin(-1))

    difference = np.abs(found.reconstruction - exact.reconstruction)
    assert 0 < difference.mean() < 0.01
    assert np.mean(np.asarray(found.quantizer.indices) == exact.quantizer.indices) > 0.9


def test_the_example_of_the_docstring_runs():
    found = doctest.testmod(vqvae)
    assert found.attempted > 0
    assert found.failed == 0
