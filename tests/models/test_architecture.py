"""Each option of the network trains, is saved and restored, and makes the shapes and codes that it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax import evaluation, training
from vqvae_jax.checkpoint import Checkpoints
from vqvae_jax.config import Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.data import loader, nifti
from vqvae_jax.models.quantizer import CODEBOOK
from vqvae_jax.models.vqvae import VQVAE

pytestmark = pytest.mark.usefixtures("compile_fast")

OPTIONS = {
    "group norm": {"norm": "group"},
    "downsampling 8, pre-activation": {"downsampling": 8, "residual": "pre"},
    "group norm, no attention": {"norm": "group", "attention": False},
    "all, ema": {"norm": "group", "downsampling": 16, "residual": "pre", "codebook_update": "ema"},
}
AVERAGED = ("group norm", "all, ema")
"""Options that are trained with moving averages of the weights, saved and restored: their states are others."""


def config(**model):
    sizes = {"image_size": (32, 16), "hidden_channels": 8, "embedding_dim": 4, "num_embeddings": 16}
    return Config(
        model=ModelConfig(**{**sizes, "residual_blocks": 1, **model}),
        loss=LossConfig(perceptual_weight=0),
        training=TrainingConfig(batch_size=4, learning_rate=3e-3, remat="none"),
    )


def batch(seed, run):
    return np.random.default_rng(seed).random((1, 4, *run.model.image_size, 1), np.float32)


def assert_identical(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("option", OPTIONS)
def test_trains_and_goes_on_after_a_resume(option, tmp_path):
    """Steps move every kernel and scale; the next is bit for bit the same from a checkpoint, into a state of zeros."""
    run = config(**OPTIONS[option])
    if option in AVERAGED:
        run = dataclasses.replace(run, training=dataclasses.replace(run.training, average_decay=0.9))
    step = training.make_train_step(run)
    initial = jax.device_get(training.create_train_state(run, steps_per_epoch=10))
    state = training.replicate(jax.tree.map(jnp.array, initial))
    for number in range(2):  # attention's projections have no gradient until gamma has moved
        state, metrics = step(state, batch(number, run), None)
    assert np.isfinite(metrics.losses.total)
    for (path, old), new in zip(jax.tree.leaves_with_path(initial.params), jax.tree.leaves(state.params), strict=True):
        # Norms and softmax leave some biases without effect.
        assert path[-1].key == "bias" or np.any(old != new), jax.tree_util.keystr(path)
    if option not in AVERAGED:
        return

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {}, 0.5)
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, initial))
    evaluated, _ = checkpoints.restore_variables(initial.evaluated)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(initial)
    assert_identical(evaluated, state.evaluated)
    straight, _ = step(state, batch(2, run), None)
    resumed, _ = step(training.replicate(restored), batch(2, run), None)
    assert_identical(resumed, straight)


@pytest.mark.parametrize(("update", "kept"), [("gradient", []), ("ema", [CODEBOOK])])
def test_group_norm_keeps_no_statistics(update, kept):
    run = config(norm="group", codebook_update=update)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, average_decay=0.9))
    state = jax.eval_shape(lambda: training.create_train_state(run, 10))
    assert list(state.model_state) == kept
    assert list(state.average) == ["params"]


@pytest.mark.parametrize("downsampling", [4, 8, 16])
def test_a_code_stands_for_a_square_of_pixels(downsampling):
    model = config(downsampling=downsampling, image_size=(64, 48)).model
    found, variables = jax.eval_shape(VQVAE(model).init_with_output, jax.random.key(0), jnp.zeros((2, 64, 48, 1)))
    assert found.reconstruction.shape == (2, 64, 48, 1)
    assert found.quantizer.indices.shape == (2, 64 // downsampling, 48 // downsampling)
    for part in ("encoder", "decoder"):
        extra = [name for name in variables["params"][part] if name.startswith("extra_norm")]
        assert len(extra) == {4: 0, 8: 1, 16: 2}[downsampling]


@pytest.mark.parametrize("downsampling", [8, 16])
def test_bits_per_pixel_are_those_of_the_downsampling(downsampling):
    """16 codes take 4 bits, for each square of pixels."""
    run = config(downsampling=downsampling, residual_blocks=0)
    image = np.random.default_rng(0).uniform(0, 900, run.model.image_size).astype(np.float32)
    record = {"image": image, "affine": np.eye(4), "file": b"a.nii", "case": b"a", "slice": 0}
    record["range"] = np.array(nifti.intensity_range(image, (0.5, 99.5)), np.float32)
    slices = loader.Slices([record], run.data, run.model.image_size)
    found = evaluation.Evaluator(run, slices).run(training.create_train_state(run, 1).variables)
    assert found.codes_per_slice == (found.counts.sum(),) == (32 * 16 / downsampling**2,)
    np.testing.assert_allclose(found.summary()["bits_per_pixel"], 4 / downsampling**2)


@pytest.mark.parametrize("blocks", [0, 2])
def test_pre_activation_ends_with_a_norm_and_an_activation(blocks):
    """One norm more than with post-activation in encoder and decoder, where there are blocks at all."""
    parts = {}
    for residual in ("post", "pre"):
        model = VQVAE(config(residual=residual, residual_blocks=blocks).model)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 16, 1)))["params"]
        parts[residual] = {(part, name) for part in ("encoder", "decoder") for name in params[part]}
    added = {("encoder", "residual_norm"), ("decoder", "residual_norm")} if blocks else set()
    assert parts["pre"] - parts["post"] == added
    assert parts["post"] <= parts["pre"]


@pytest.mark.parametrize("attention", [True, False])
def test_attention_alone_sees_the_whole_image(attention):
    """A pixel in one corner moves the latent of the other only by attention, whose gamma is set off 0 here."""
    model = config(attention=attention, image_size=(64, 64), residual_blocks=0).model
    image = jnp.zeros((1, 64, 64, 1))
    variables = jax.device_get(jax.jit(VQVAE(model).init)(jax.random.key(0), image))
    if attention:
        variables["params"]["encoder"]["attention"]["gamma"] = np.ones(())
    encode = jax.jit(lambda image: VQVAE(model).apply(variables, image, method="encode"))
    moved = encode(image) != encode(image.at[0, 0, 0].set(1))
    assert moved[0, 0, 0].any()
    assert bool(moved[0, -1, -1].any()) == attention
