"""The networks that benchmarks/transforms.py compares."""

import jax
import numpy as np

from vqvae_jax.models.quantizer import EMA


def nearest(vectors, codes):
    return np.argmin(np.sum((vectors[:, None] - codes[None]) ** 2, axis=-1), axis=1)


def test_each_stage_takes_the_code_nearest_to_what_is_left(benchmark_module):
    """Against a search in NumPy, stage after stage; gradients pass to the latents as if nothing were quantized."""
    quantizer = benchmark_module("transforms").ResidualQuantizer(3, 8, 4)
    latents = np.float32(np.random.default_rng(0).normal(size=(2, 5, 3, 4)))
    variables = quantizer.init({"params": jax.random.key(0), EMA: jax.random.key(1)}, latents)
    rngs = {EMA: jax.random.key(2)}
    _, variables = quantizer.apply(variables, latents, train=True, mutable=[EMA], rngs=rngs)  # k-means
    output = quantizer.apply(variables, latents)
    rest, counts = latents.reshape(-1, 4).astype(np.float64), []
    for stage in range(3):
        codes = np.asarray(variables[EMA][f"of_stages_{stage}"]["codebook"], np.float64)
        chosen = nearest(rest, codes)
        np.testing.assert_array_equal(np.asarray(output.indices)[..., stage].ravel(), chosen)
        rest = rest - codes[chosen]
        counts += np.bincount(chosen, minlength=8).tolist()
    np.testing.assert_allclose(output.quantized, latents - rest.reshape(latents.shape), atol=1e-5)
    np.testing.assert_array_equal(output.counts, counts)
    gradient = jax.grad(lambda z: quantizer.apply(variables, z).quantized.sum())(latents)
    np.testing.assert_array_equal(gradient, np.ones_like(latents))
