"""Losses equal PyTorch's and what a hand computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax import losses


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 8, 4, 1), (3, 5), (1,)])
def test_reconstruction_equals_torch(shape):
    torch = pytest.importorskip("torch")
    a, b = normal(*shape), normal(*shape, seed=1)
    expected = torch.nn.functional.l1_loss(torch.from_numpy(a), torch.from_numpy(b)).item()
    np.testing.assert_allclose(losses.reconstruction_loss(a, b), expected, rtol=1e-6)


def test_reconstruction_of_bfloat16_is_summed_in_float32():
    """4096 differences of 1 have the mean 1; in bfloat16 the sum would stop growing at 256."""
    found = losses.reconstruction_loss(jnp.ones(4096, jnp.bfloat16), jnp.zeros(4096, jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert found == 1


def test_perceptual_averages_layers_alike_whatever_their_size():
    """Layer a differs by 1 everywhere, layer b by 2 in one of its four numbers: (1 + 2 / 4) / 2."""
    target = {"a": np.zeros((1, 4, 4, 8), np.float32), "b": np.zeros((1, 1, 1, 4), np.float32)}
    features = {"a": target["a"] + 1, "b": np.float32([[[[0, 0, -2, 0]]]])}
    np.testing.assert_allclose(losses.perceptual_loss(features, target), 0.75, rtol=1e-6)
    assert losses.perceptual_loss(target, target) == 0


@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
def test_total_weighs_only_the_perceptual_term(weight):
    found = losses.total_loss(jnp.float32(0.5), jnp.float32(7.0), jnp.float32(0.25), weight)
    np.testing.assert_allclose(found.total, 0.75 + 7 * weight, rtol=1e-6)
    assert (found.reconstruction, found.perceptual, found.quantizer) == (0.5, 7.0, 0.25)
