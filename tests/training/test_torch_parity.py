"""The model and its training equal PyTorch's; against the reference itself, or its golden files without torch."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from golden import GOLDEN, SIZE, STEPS

from vqvae_jax.config import LossConfig, TrainingConfig
from vqvae_jax.inference import torch_import
from vqvae_jax.models import vgg_weights
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.training.state import create_train_state
from vqvae_jax.training.step import make_train_step, replicate

pytestmark = pytest.mark.parity

TOTAL, L1, PERCEPTUAL, QUANTIZER = range(4)


def nhwc(images):
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def tensors(record, prefix):
    return {name.removeprefix(prefix): record[name] for name in record if name.startswith(prefix)}


@pytest.fixture(scope="module", params=[pytest.param("torch", marks=pytest.mark.slow), "golden"])
def record(request):
    """What PyTorch computes: now, and as it was written down."""
    if request.param == "golden":
        return dict(np.load(GOLDEN))
    pytest.importorskip("torch")
    from make_golden import compute  # noqa: PLC0415  (imports torch)

    return compute()


def difference(ours, theirs):
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))


def report(record_property, row, worst):
    """Shown by pytest -rP, and kept in its XML."""
    print(f"largest difference, {row}: {worst:.2e}")
    record_property(row, float(worst))


def published(record, name):
    config, variables = torch_import.convert(tensors(record, f"{name}/state/"))
    return config, variables


@pytest.mark.parametrize("name", [pytest.param("even", marks=pytest.mark.slow), "straddling"])
def test_an_imported_model_reconstructs_as_pytorch_does(record, name, record_property):
    config, variables = published(record, name)
    output = VQVAE(config.model).apply(variables, nhwc(record[f"{name}/images"]))
    assert output.quantizer.indices.shape == record[f"{name}/codes"].shape
    assert len(np.unique(record[f"{name}/codes"])) > 8
    np.testing.assert_array_equal(output.quantizer.indices, record[f"{name}/codes"])
    worst = difference(output.reconstruction, nhwc(record[f"{name}/reconstruction"]))
    report(record_property, "reconstruction, absolute", worst)
    assert worst < 1e-4
    np.testing.assert_allclose(output.quantizer.loss, record[f"{name}/quantizer_loss"], rtol=1e-5)


def test_codes_alone_decode_to_the_same_image(record):
    config, variables = published(record, "straddling")
    images = VQVAE(config.model).apply(variables, record["straddling/codes"], method="from_indices")
    assert difference(images, nhwc(record["straddling/reconstruction"])) < 1e-4


def training_setup(record):
    """Configuration, state and VGG variables that start where PyTorch's training starts."""
    config, variables = torch_import.convert(tensors(record, "training/before/"))
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, image_size=SIZE, reference_flatten=False),
        loss=LossConfig(perceptual_weight=0.1, vgg_weights="random"),
        training=TrainingConfig(batch_size=4, learning_rate=1e-4, gradient_clip=1.0),
    )
    state = create_train_state(config, steps_per_epoch=100)
    params = variables.pop("params")
    state = replicate(state.replace(params=params, model_state=variables))
    vgg = vgg_weights.load("random", *config.loss.perceptual_layers)
    return config, state, vgg


def ours_by_their_names(record, params):
    """Our parameters, or gradients, as pairs with PyTorch's under the names of the state dict."""
    before = tensors(record, "training/before/")
    widths = torch_import._widths(before, "")
    for name, target in torch_import._tensors(*widths):
        if target.path[0] == "params":
            value = params
            for key in target.path[1:]:
                value = value[key]
            yield name, target, np.asarray(value)


def test_losses_and_gradients_equal_pytorchs(record, record_property):
    """After one step, Adam's first moment is a tenth of the clipped gradient."""
    config, state, vgg = training_setup(record)
    state, metrics = make_train_step(config)(state, nhwc(record["training/images"])[None], vgg)
    norm = np.sqrt(sum(np.sum(np.square(value)) for value in tensors(record, "training/gradients/").values()))
    np.testing.assert_allclose(metrics.gradient_norm, norm, rtol=1e-4)
    gradients = jax.tree.map(lambda moment: 10 * moment * max(1, norm), optax.tree.get(state.opt_state, "mu"))
    parts, counts = metrics.losses, metrics.counts
    theirs = record["training/losses"][0]
    np.testing.assert_array_equal(counts, np.bincount(record["training/codes"].ravel(), minlength=counts.size))
    found = np.array([float(x) for x in (parts.total, parts.reconstruction, parts.perceptual, parts.quantizer)])
    np.testing.assert_allclose(found, theirs, rtol=1e-4)
    report(record_property, "loss parts, relative", float(np.max(np.abs(found / theirs - 1))))
    worst = 0.0
    for name, target, ours in ours_by_their_names(record, gradients):
        expected = target.convert(record[f"training/gradients/{name}"])
        scale = np.abs(expected).max()
        if cancelled(name):
            assert np.abs(ours).max() < 1e-5
            continue
        worst = max(worst, difference(ours, expected) / scale)
    report(record_property, "gradients, relative to the largest entry", worst)
    assert worst < 1e-3


def test_five_steps_of_adam_end_at_pytorchs_parameters(record, record_property):
    config, state, vgg = training_setup(record)
    step = make_train_step(config)
    for number in range(STEPS):
        state, metrics = step(state, nhwc(record["training/images"])[None], vgg)
        np.testing.assert_allclose(metrics.losses.total, record["training/losses"][number][TOTAL], rtol=1e-4)
    worst = 0.0
    for name, target, ours in ours_by_their_names(record, state.params):
        if cancelled(name):
            continue
        worst = max(worst, difference(ours, target.convert(record[f"training/after/{name}"])))
    report(record_property, "parameters after five steps, absolute", worst)
    assert worst < 1e-4


def cancelled(name):
    """A bias that what follows takes away again (batch norm, or the softmax over keys).

    Its gradient is rounding error and nothing else, which Adam scales up to whole steps in both frameworks.
    """
    kept = name == "decoder.conv3.bias" or name.endswith(("query_conv.bias", "value_conv.bias"))
    return name.endswith("bias") and "conv" in name and not kept


def test_the_golden_file_is_what_the_reference_computes():
    pytest.importorskip("torch")
    from make_golden import compute  # noqa: PLC0415  (imports torch)

    written, computed = dict(np.load(GOLDEN)), compute()
    assert written.keys() == computed.keys()
    for name, value in computed.items():
        if name.startswith("training/after/") and cancelled(name.removeprefix("training/after/")):
            # Each machine's rounding sends it another way, by at most the learning rate in each step.
            assert difference(written[name], value) < 2 * STEPS * 1e-4, name
            continue
        np.testing.assert_allclose(written[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert Path(GOLDEN).stat().st_size < 3_000_000
