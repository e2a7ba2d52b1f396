"""Losses equal PyTorch's and what a hand computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.training import losses


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


SCALE = {"l1": 1, "l2": 0.05}
"""What each is divided by: L2 by about the variance of scans in [0, 1]."""


@pytest.mark.parametrize("name", SCALE)
@pytest.mark.parametrize("shape", [(2, 8, 4, 1), (3, 5), (1,)])
def test_reconstruction_equals_torch(shape, name):
    torch = pytest.importorskip("torch")
    theirs = {"l1": torch.nn.functional.l1_loss, "l2": torch.nn.functional.mse_loss}[name]
    a, b = normal(*shape), normal(*shape, seed=1)
    expected = theirs(torch.from_numpy(a), torch.from_numpy(b)).item() / SCALE[name]
    np.testing.assert_allclose(losses.RECONSTRUCTION[name](a, b), expected, rtol=1e-6)


@pytest.mark.parametrize("name", losses.RECONSTRUCTION)
def test_reconstruction_of_bfloat16_is_summed_in_float32(name):
    """4096 differences of 1 have the mean 1, also squared; in bfloat16 the sum would stop growing at 256."""
    found = losses.RECONSTRUCTION[name](jnp.ones(4096, jnp.bfloat16), jnp.zeros(4096, jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1 / SCALE[name], rtol=1e-6)


def test_perceptual_averages_layers_alike_whatever_their_size():
    """Layer a differs by 1 everywhere, layer b by 2 in one of its four numbers: (1 + 2 / 4) / 2."""
    target = {"a": np.zeros((1, 4, 4, 8), np.float32), "b": np.zeros((1, 1, 1, 4), np.float32)}
    features = {"a": target["a"] + 1, "b": np.float32([[[[0, 0, -2, 0]]]])}
    np.testing.assert_allclose(losses.perceptual_loss(features, target), 0.75, rtol=1e-6)
    assert losses.perceptual_loss(target, target) == 0
