"""Losses equal PyTorch's and what a hand computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax import losses
from vqvae_jax.config import LossConfig
from vqvae_jax.similarity import ms_ssim, ssim


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize("shape", [(2, 8, 4, 1), (3, 5), (1,)])
def test_reconstruction_equals_torch(shape, name):
    torch = pytest.importorskip("torch")
    theirs = {"l1": torch.nn.functional.l1_loss, "l2": torch.nn.functional.mse_loss}[name]
    a, b = normal(*shape), normal(*shape, seed=1)
    expected = theirs(torch.from_numpy(a), torch.from_numpy(b)).item()
    np.testing.assert_allclose(losses.RECONSTRUCTION[name](a, b), expected, rtol=1e-6)


def test_charbonnier_is_an_absolute_value_that_is_smooth_at_0():
    """A 3-4-5 triangle; far from 0 the difference itself; at 0 epsilon, with gradient 0; between, L2's shape."""
    e = losses.CHARBONNIER_EPSILON
    differences = np.float32([0.75 * e, 2.0, -2.0, 0.0])
    found = [losses.charbonnier_loss(jnp.array([d]), jnp.zeros(1)) for d in differences]
    np.testing.assert_allclose(found, [1.25 * e, 2, 2, e], rtol=1e-5)
    gradients = [jax.grad(losses.charbonnier_loss)(jnp.array([d]), jnp.zeros(1))[0] for d in differences]
    np.testing.assert_allclose(gradients, [0.6, 1, -1, 0], rtol=1e-5)
    np.testing.assert_allclose(losses.charbonnier_loss(differences, 0 * differences), np.mean(found), rtol=1e-6)


@pytest.mark.parametrize("name", losses.RECONSTRUCTION)
def test_reconstruction_of_bfloat16_is_summed_in_float32(name):
    """4096 differences of 1 have the mean 1; in bfloat16 the sum would stop growing at 256."""
    found = losses.RECONSTRUCTION[name](jnp.ones(4096, jnp.bfloat16), jnp.zeros(4096, jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1, rtol=1e-6)


def test_perceptual_averages_layers_alike_whatever_their_size():
    """Layer a differs by 1 everywhere, layer b by 2 in one of its four numbers: (1 + 2 / 4) / 2."""
    target = {"a": np.zeros((1, 4, 4, 8), np.float32), "b": np.zeros((1, 1, 1, 4), np.float32)}
    features = {"a": target["a"] + 1, "b": np.float32([[[[0, 0, -2, 0]]]])}
    np.testing.assert_allclose(losses.perceptual_loss(features, target), 0.75, rtol=1e-6)
    assert losses.perceptual_loss(target, target) == 0


IMAGES = np.random.default_rng(0).uniform(size=(2, 16, 16, 1)).astype(np.float32)
TARGET = np.float32(IMAGES + normal(2, 16, 16, 1) / 10)
QUANTIZER, PERCEPTUAL = jnp.float32(0.25), jnp.float32(7)


@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
def test_by_default_the_total_is_the_published_one(weight):
    found = losses.total_loss(LossConfig(perceptual_weight=weight), IMAGES, TARGET, QUANTIZER, PERCEPTUAL)
    l1 = np.abs(IMAGES - TARGET).mean()
    np.testing.assert_allclose(found.total, l1 + 0.25 + 7 * weight, rtol=1e-6)
    np.testing.assert_allclose(found.reconstruction, l1, rtol=1e-6)
    assert (found.perceptual, found.quantizer, found.ssim, found.ms_ssim) == (7.0, 0.25, 0, 0)


@pytest.mark.parametrize("name", losses.RECONSTRUCTION)
def test_every_part_comes_in_by_its_weight(name):
    config = LossConfig(reconstruction=name, perceptual_weight=0.5, ssim_weight=2.0, ms_ssim_weight=3.0)
    found = losses.total_loss(config, IMAGES, TARGET, QUANTIZER, PERCEPTUAL)
    similar, ms_similar = ssim(IMAGES, TARGET).mean(), ms_ssim(IMAGES, TARGET).mean()
    assert 0.1 < similar < 0.99 and abs(ms_similar - similar) > 1e-3  # so that no two parts can be mixed up
    np.testing.assert_allclose((found.ssim, found.ms_ssim), (1 - similar, 1 - ms_similar), rtol=1e-5)
    expected = losses.RECONSTRUCTION[name](IMAGES, TARGET) + 0.25 + 3.5 + 2 * (1 - similar) + 3 * (1 - ms_similar)
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)


def test_hinge_losses_equal_torch():
    """A logit beyond the margin costs the discriminator nothing; the generator gains by every bit."""
    torch = pytest.importorskip("torch")
    real, fake = 2 * normal(2, 3, 4, 1), 2 * normal(2, 3, 4, 1, seed=1)
    theirs = [torch.nn.functional.relu(1 + sign * torch.from_numpy(x)).mean() for sign, x in ((-1, real), (1, fake))]
    np.testing.assert_allclose(losses.hinge_discriminator_loss(real, fake), sum(theirs).item() / 2, rtol=1e-6)
    np.testing.assert_allclose(losses.hinge_generator_loss(fake), -torch.from_numpy(fake).mean().item(), rtol=1e-5)
    assert losses.hinge_discriminator_loss(np.float32([1, 5]), np.float32([-1, -5])) == 0
