"""What is said of a codebook's use is what SciPy and NumPy say of the counts, and keeps its limits."""

import jax.numpy as jnp
import numpy as np
from scipy import stats

from vqvae_jax import metrics


def test_perplexity_counts_the_codes_in_equal_use():
    np.testing.assert_allclose(metrics.perplexity(jnp.full(512, 3)), 512, rtol=1e-5)
    np.testing.assert_allclose(metrics.perplexity(jnp.array([0, 9, 0, 9, 0])), 2, rtol=1e-6)
    np.testing.assert_allclose(metrics.perplexity(jnp.array([0, 7, 0])), 1, rtol=1e-6)


def test_perplexity_is_exp_of_the_entropy():
    counts = np.random.default_rng(0).integers(0, 2_000_000, 512)  # their sum is past float32's integers
    p = counts[counts > 0] / counts.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(metrics.perplexity(jnp.asarray(counts)), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.perplexity(jnp.asarray(counts / 1e9)), expected, rtol=1e-5)


def test_an_unused_codebook():
    counts = jnp.zeros(8, jnp.int32)
    assert metrics.perplexity(counts) == 0
    assert metrics.codebook_usage(counts) == 0


def test_codebook_usage_is_the_share_of_codes_met():
    counts = jnp.array([[0, 1, 0, 500], [1, 1, 2, 0]])
    np.testing.assert_array_equal(metrics.codebook_usage(counts), [0.5, 0.75])


def test_code_entropy_is_what_an_ideal_coder_spends():
    np.testing.assert_allclose(metrics.code_entropy(jnp.full(512, 3)), 9, rtol=1e-6)
    np.testing.assert_array_equal(metrics.code_entropy(jnp.array([0, 7, 0])), 0)
    np.testing.assert_allclose(metrics.code_entropy(jnp.array([[2, 1, 1], [1, 1, 0]])), [1.5, 1], rtol=1e-6)
    counts = np.random.default_rng(0).integers(0, 2_000_000, 512) ** 2.0
    np.testing.assert_allclose(metrics.code_entropy(counts), stats.entropy(counts, base=2), rtol=1e-5)
    np.testing.assert_allclose(metrics.perplexity(counts), 2 ** stats.entropy(counts, base=2), rtol=1e-5)
    assert np.isnan(metrics.code_entropy(jnp.zeros(4)))
