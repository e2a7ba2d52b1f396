"""The discriminator is PyTorch's PatchGAN with group norm: shapes, patches, numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models.discriminator import PatchDiscriminator, smallest_side
from vqvae_jax.models.layers import Norm

pytestmark = pytest.mark.usefixtures("compile_fast")


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("layers", "smaller"), [(1, {}), (2, {}), (3, {}), (3, {"dtype": jnp.bfloat16})])
@pytest.mark.parametrize("size", [(256, 128), (48, 24), (63, 41)])
def test_logits_are_float32_one_for_each_patch(layers, smaller, size):
    found, _ = jax.eval_shape(
        PatchDiscriminator(8, layers, **smaller).init_with_output, jax.random.key(0), jnp.zeros((3, *size, 1))
    )
    assert found.shape == (3, *(side // 2**layers - 2 for side in size), 1)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_the_smallest_image_has_one_logit(layers):
    side = smallest_side(layers)
    found, _ = jax.eval_shape(
        PatchDiscriminator(8, layers).init_with_output, jax.random.key(0), jnp.zeros((1, side, 2 * side, 1))
    )
    assert found.shape == (1, 1, 4, 1)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (3, 70)])
def test_the_convolutions_of_a_logit_see_its_patch_alone(layers, patch):
    """The pixels that move the logit in the middle, without norms; 70 for three layers is the paper's figure."""
    discriminator, images = PatchDiscriminator(2, layers), normal(1, 96, 100, 1)
    params = jax.jit(discriminator.init)(jax.random.key(0), images)

    def middle(images):
        logits = discriminator.apply(params, images)
        return logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]

    def without_norms(call, arguments, options, context):
        return arguments[0] if isinstance(context.module, Norm) else call(*arguments, **options)

    with nn.intercept_methods(without_norms):
        moved = np.asarray(jax.jit(jax.grad(middle))(images))[0, ..., 0] != 0
    rows, columns = np.flatnonzero(moved.any(1)), np.flatnonzero(moved.any(0))
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == patch
    assert moved.sum() > 0.99 * patch**2


def test_an_image_is_judged_by_itself():
    images = normal(3, 24, 12, 1)
    images[1:] *= 10
    discriminator = PatchDiscriminator(8, 2)
    params = jax.jit(discriminator.init)(jax.random.key(0), images)
    together, alone = (jax.jit(discriminator.apply)(params, batch) for batch in (images, images[:1]))
    np.testing.assert_allclose(together[:1], alone, rtol=1e-5, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2


@pytest.mark.parity
@pytest.mark.parametrize(("channels", "layers"), [(4, 4)])
def test_logits_and_gradients_equal_torchs(channels, layers):
    torch = pytest.importorskip("torch")
    import torch_reference  # noqa: PLC0415  (imports torch)

    from_torch = torch_reference.discriminator_params

    torch.manual_seed(0)
    reference, images = torch_reference.PatchDiscriminator(channels, layers), normal(2, 56, 64, 1)
    for name, value in reference.named_parameters():
        if name.startswith("norm"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    theirs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    logits = reference(theirs)
    cotangent = normal(*logits.shape)
    logits.backward(torch.from_numpy(cotangent))

    def judge(params, images):
        return PatchDiscriminator(channels, layers).apply({"params": params}, images)

    @jax.jit
    def run(params, images, cotangent):
        found, pull = jax.vjp(judge, params, images)
        return found, *pull(cotangent)

    found, gradients, towards = run(from_torch(reference), images, cotangent.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, logits.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    for module in reference.children():
        module.weight.data, module.bias.data = module.weight.grad, module.bias.grad
    expected = from_torch(reference), theirs.grad.numpy().transpose(0, 2, 3, 1)
    assert jax.tree.structure(expected[0]) == jax.tree.structure(gradients)
    for a, b in zip(jax.tree.leaves((gradients, towards)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
