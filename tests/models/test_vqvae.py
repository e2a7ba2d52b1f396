"""The network's shapes, size and range, and that its parts make up the whole."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.config import PRESETS, Config, ModelConfig
from vqvae_jax.data import intensity, loader
from vqvae_jax.evaluation.evaluator import Evaluator
from vqvae_jax.models import vqvae
from vqvae_jax.models.quantizer import EMA
from vqvae_jax.models.vqvae import VQVAE, decoding_variables
from vqvae_jax.training.prior_step import codebook_of

pytestmark = pytest.mark.usefixtures("compile_fast")

TINY = ModelConfig(image_size=(32, 16), hidden_channels=8, embedding_dim=4, num_embeddings=16, residual_blocks=1)
UPDATES = ["gradient", "ema"]
MODELS = [(update, code_dim) for update in UPDATES for code_dim in (0, 3)]
TWO_MODELS = [
    model if model in (("gradient", 0), ("ema", 3)) else pytest.param(*model, marks=pytest.mark.slow)
    for model in MODELS
]
"""All of them, of which two are tested quickly."""


def images(n=3, config=TINY):
    return np.random.default_rng(n).random((n, *config.image_size, 1), np.float32)


@functools.cache
def method(config, name="__call__", **keywords):
    return jax.jit(functools.partial(VQVAE(config).apply, method=name, **keywords))


def variants(**fields):
    return dataclasses.replace(TINY, **fields)


@functools.cache
def trained(update="gradient", code_dim=0):
    """A model as training might leave it: gammas, norms and statistics disturbed, codes among the latents."""
    config = variants(codebook_update=update, code_dim=code_dim)
    rng = np.random.default_rng(0)
    variables = jax.device_get(jax.jit(VQVAE(config).init)(jax.random.key(0), images(1)))

    def disturb(path, leaf):
        noise = rng.random(leaf.shape) if path[-1].key == "var" else rng.standard_normal(leaf.shape)
        return leaf if leaf.dtype == bool else leaf + 0.2 * noise.astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(disturb, variables)
    latents = np.asarray(method(config, "encode")(variables, images(5))).reshape(-1, config.embedding_dim)
    place = variables["params" if update == "gradient" else EMA]["quantizer"]
    if code_dim:
        dense = variables["params"]["quantizer"]["project_in"]
        latents, place = latents @ dense["kernel"] + dense["bias"], place["quantizer"]
    place["codebook"] = rng.choice(latents, config.num_embeddings, replace=False)
    return config, variables


@pytest.mark.parametrize(
    ("size", "downsampling"), [((256, 128), 4), ((32, 16), 4), ((36, 20), 4), ((64, 48), 8), ((64, 48), 16)]
)
def test_a_code_stands_for_a_square_of_pixels(size, downsampling):
    config = variants(image_size=size, downsampling=downsampling)
    found, variables = jax.eval_shape(VQVAE(config).init_with_output, jax.random.key(0), images(2, config))
    codes = (2, size[0] // downsampling, size[1] // downsampling)
    assert found.reconstruction.shape == (2, *size, 1)
    assert found.quantizer.quantized.shape == (*codes, TINY.embedding_dim)
    assert found.quantizer.indices.shape == codes
    assert config.latent_size == codes[1:]
    for part in ("encoder", "decoder"):
        extra = [name for name in variables["params"][part] if name.startswith("extra_norm")]
        assert len(extra) == {4: 0, 8: 1, 16: 2}[downsampling]


@pytest.mark.slow
@pytest.mark.parametrize("downsampling", [8, 16])
def test_bits_per_pixel_are_those_of_the_downsampling(downsampling):
    """16 codes take 4 bits, for each square of pixels."""
    run = Config(model=variants(downsampling=downsampling, residual_blocks=0))
    image = np.random.default_rng(0).uniform(0, 900, run.model.image_size).astype(np.float32)
    record = {"image": image, "affine": np.eye(4), "file": b"a.nii", "case": b"a", "slice": 0}
    record["range"] = np.array(intensity.intensity_range(image, (0.5, 99.5)), np.float32)
    slices = loader.Slices([record], run.data, run.model.image_size)
    variables = jax.jit(VQVAE(run.model).init)(jax.random.key(0), images(1))
    found = Evaluator(run, slices).run(variables)
    assert found.codes_per_slice == found.counts.sum() == 32 * 16 / downsampling**2
    np.testing.assert_allclose(found.summary()["bits_per_pixel"], 4 / downsampling**2)


@pytest.mark.parametrize("blocks", [0, 2])
def test_pre_activation_ends_with_a_norm_and_an_activation(blocks):
    """One norm more than with post-activation in encoder and decoder, where there are blocks at all."""
    parts = {}
    for residual in ("post", "pre"):
        model = VQVAE(variants(residual=residual, residual_blocks=blocks))
        params = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
        parts[residual] = {(part, name) for part in ("encoder", "decoder") for name in params[part]}
    added = {("encoder", "residual_norm"), ("decoder", "residual_norm")} if blocks else set()
    assert parts["pre"] - parts["post"] == added
    assert parts["post"] <= parts["pre"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", [True, False])
def test_attention_alone_sees_the_whole_image(attention):
    """A pixel in one corner moves the latent of the other only by attention, whose gamma is set off 0 here."""
    model = variants(attention=attention, image_size=(64, 64), residual_blocks=0)
    image = jnp.zeros((1, 64, 64, 1))
    variables = jax.device_get(jax.jit(VQVAE(model).init)(jax.random.key(0), image))
    if attention:
        variables["params"]["encoder"]["attention"]["gamma"] = np.ones(())
    encode = jax.jit(lambda image: VQVAE(model).apply(variables, image, method="encode"))
    moved = encode(image) != encode(image.at[0, 0, 0].set(1))
    assert moved[0, 0, 0].any()
    assert bool(moved[0, -1, -1].any()) == attention


def test_reference_network_has_the_published_size():
    variables = jax.eval_shape(VQVAE(PRESETS["reference"].model).init, jax.random.key(0), jnp.zeros((1, 256, 256, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 6_665_475


@pytest.mark.slow
@pytest.mark.parametrize(("update", "code_dim"), TWO_MODELS)
def test_parts_make_up_the_whole(update, code_dim):
    config, variables = trained(update, code_dim)
    whole = method(config)(variables, images())
    latents = method(config, "encode")(variables, images())
    quantized = method(config, "quantize")(variables, latents)
    np.testing.assert_array_equal(quantized.indices, whole.quantizer.indices)
    assert len(np.unique(quantized.indices)) > 4
    decoded = method(config, "decode")(variables, quantized.quantized)
    np.testing.assert_allclose(decoded, whole.reconstruction, rtol=1e-5, atol=1e-6)
    looked_up = method(config, "lookup")(variables, quantized.indices)
    np.testing.assert_allclose(looked_up, quantized.quantized, rtol=1e-6, atol=1e-6)
    codes = codebook_of(variables)
    narrow = method(config, "to_latents")(variables, images())
    distances = ((np.asarray(narrow)[..., None, :] - codes) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=-1), quantized.indices)
    from_codes = method(config, "from_codes")(variables, codes[quantized.indices])
    np.testing.assert_allclose(from_codes, decoded, rtol=1e-5, atol=1e-6)


def test_indices_alone_give_the_reconstruction():
    config, variables = trained()
    whole = method(config)(variables, images())
    indices = method(config, "to_indices")(variables, images())
    np.testing.assert_array_equal(indices, whole.quantizer.indices)
    decoded = method(config, "from_indices")(variables, indices)
    np.testing.assert_allclose(decoded, whole.reconstruction, rtol=1e-5, atol=1e-6)


def test_the_image_depends_on_each_of_its_codes():
    """Another code at one place changes the pixels there, by more than rounding, and no other image."""
    config, variables = trained()
    indices = np.asarray(method(config, "to_indices")(variables, images()))
    before = method(config, "from_indices")(variables, indices)
    other = indices.copy()
    other[0, 1, 1] = (other[0, 1, 1] + 1) % config.num_embeddings
    change = np.abs(method(config, "from_indices")(variables, other) - before)
    assert change[0, 4:8, 4:8].min() > 1e-5
    assert change[1:].max() == 0


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


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
def test_only_training_changes_what_the_model_keeps(update):
    config, variables = trained(update)
    collections = [name for name in variables if name != "params"]
    assert collections == (["batch_stats"] if update == "gradient" else ["batch_stats", EMA])
    for train in (False, True):
        apply = method(config, train=train, mutable=tuple(collections))
        _, after = apply(variables, images(), rngs={EMA: jax.random.key(0)})
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

    codes = variables["params"]["quantizer"]["codebook"].astype(np.float64)
    distances = ((np.float64(latents)[..., None, :] - codes) ** 2).sum(-1)
    np.testing.assert_array_equal(method(half, "quantize")(variables, latents).indices, distances.argmin(-1))

    difference = np.abs(found.reconstruction - exact.reconstruction)
    assert 0 < difference.mean() < 0.01
    assert np.mean(np.asarray(found.quantizer.indices) == exact.quantizer.indices) > 0.9


@pytest.mark.parametrize(("update", "code_dim"), TWO_MODELS)
def test_decoding_variables_are_all_that_decoding_depends_on(update, code_dim):
    """With any one of them gone, images are; with all others gone, images stay the same to the last bit."""
    config, variables = trained(update, code_dim)
    named = decoding_variables(variables)
    decode = method(config, "from_indices")
    indices = np.arange(32).reshape(1, 8, 4) % config.num_embeddings
    expected = np.asarray(decode(variables, indices))

    def without(gone):
        def nan(path, leaf):
            lost = gone(jax.tree_util.keystr(path, simple=True, separator="/"))
            return np.full_like(leaf, np.nan) if lost and leaf.dtype == np.float32 else leaf

        return jax.tree_util.tree_map_with_path(nan, variables)

    np.testing.assert_array_equal(decode(without(lambda path: path not in named), indices), expected)
    for name in named:
        assert np.isnan(decode(without(lambda path, name=name: path == name), indices)).any(), name

    place = "params/quantizer" if update == "gradient" else "ema/quantizer"
    assert [name for name in named if "codebook" in name] == [place + ("/quantizer" if code_dim else "") + "/codebook"]
    assert not [name for name in named if "/encoder/" in name]


@pytest.mark.parametrize(("update", "code_dim"), TWO_MODELS)
def test_numbers_have_the_same_types_where_jax_computes_in_float64(update, code_dim):
    """As under JAX_ENABLE_X64: of fresh variables, and of what a training step makes of them."""
    config = variants(codebook_update=update, code_dim=code_dim)

    def types():
        model, image = VQVAE(config), jnp.zeros((1, 32, 16, 1), jnp.float32)
        fresh = jax.eval_shape(model.init, jax.random.key(0), image)
        collections = [name for name in fresh if name != "params"]
        rngs = {EMA: jax.random.key(0)}
        step = functools.partial(model.apply, train=True, mutable=collections, rngs=rngs)
        output, after = jax.eval_shape(step, fresh, image)
        return jax.tree.map(lambda leaf: leaf.dtype, (fresh, after, output))

    with jax.enable_x64(True):
        assert jnp.zeros(1).dtype == jnp.float64
        found = types()
    assert jnp.zeros(1).dtype == jnp.float32
    assert found == types()
    fresh, after, _ = found
    assert after == {name: fresh[name] for name in after}
    assert {leaf for leaf in jax.tree.leaves(fresh)} <= {jnp.dtype(jnp.float32), jnp.dtype(bool)}


@pytest.mark.slow
def test_the_example_of_the_docstring_runs():
    found = doctest.testmod(vqvae)
    assert found.attempted > 0
    assert found.failed == 0
