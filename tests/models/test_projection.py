"""A projected quantizer is two matrix products around another quantizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models.fsq import FiniteScalarQuantizer
from vqvae_jax.models.projection import ProjectedQuantizer
from vqvae_jax.models.quantizer import VectorQuantizer

D, WIDTH, K = 6, 2, 16


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def projected():
    """The module, and variables in which the codes lie among the projected latents."""
    module = ProjectedQuantizer(VectorQuantizer(K, WIDTH), WIDTH, D)
    variables = jax.device_get(module.init(jax.random.key(0), normal(1, D)))
    params = variables["params"]
    params["quantizer"]["embedding"] = normal(K, WIDTH)
    params["project_in"]["bias"], params["project_out"]["bias"] = normal(WIDTH, seed=1), normal(D, seed=2)
    return module, variables


def project(params, vectors):
    return np.float64(vectors) @ params["kernel"] + params["bias"]


def test_codes_are_chosen_within_and_returned_projected_back():
    module, variables = projected()
    params, latents = variables["params"], normal(2, 8, 4, D, seed=3)
    codes = params["quantizer"]["embedding"]
    distances = ((project(params["project_in"], latents)[..., None, :] - codes) ** 2).sum(-1)
    found = jax.jit(module.apply)(variables, latents)
    np.testing.assert_array_equal(found.indices, distances.argmin(-1))
    assert len(np.unique(found.indices)) > K // 2
    expected = project(params["project_out"], codes[found.indices])
    np.testing.assert_allclose(found.quantized, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.codebook_loss, distances.min(-1).mean() / WIDTH, rtol=1e-4)


def test_lookup_gives_what_the_decoder_takes():
    module, variables = projected()
    found = module.apply(variables, normal(2, 8, 4, D, seed=3))
    vectors = module.apply(variables, found.indices, method="lookup")
    np.testing.assert_allclose(vectors, found.quantized, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantizer", [VectorQuantizer(K, WIDTH), FiniteScalarQuantizer((8, 5))])
def test_both_projections_and_the_latents_learn_from_the_decoder(quantizer):
    module, latents, cotangent = ProjectedQuantizer(quantizer, WIDTH, D), normal(50, D), normal(50, D, seed=1)
    variables = module.init(jax.random.key(0), latents)
    loss = jax.grad(lambda v, z: jnp.sum(module.apply(v, z).quantized * cotangent), argnums=(0, 1))
    to_variables, to_latents = loss(variables, latents)
    for name in ("project_in", "project_out"):
        assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(to_variables["params"][name]))
    assert np.all(to_latents != 0)


def test_bfloat16_latents_are_projected_in_float32():
    module, variables = projected()
    latents = jnp.asarray(normal(256, D, seed=3), jnp.bfloat16)
    found, exact = (module.apply(variables, x) for x in (latents, latents.astype(jnp.float32)))
    np.testing.assert_array_equal(found.indices, exact.indices)
    assert found.quantized.dtype == jnp.bfloat16
    assert exact.quantized.dtype == jnp.float32


@pytest.mark.parametrize("width", [WIDTH, D + 1])
def test_wrong_width_raises(width):
    with pytest.raises(ValueError, match=f"must end in the width {D}"):
        projected()[0].init(jax.random.key(0), normal(2, width))
