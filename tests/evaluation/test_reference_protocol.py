"""The published protocol's scale: z-scores of the original, clipped, at 256 x 256."""

import numpy as np
import pytest

from vqvae_jax.evaluation import reference_protocol


@pytest.fixture
def original():
    return np.random.default_rng(0).normal(300, 80, (256, 128)).astype(np.float32)


def test_the_original_is_scored_by_its_own_mean_and_deviation(original):
    scored = reference_protocol.z_score(original, original)
    assert abs(scored.mean()) < 1e-3
    assert abs(scored.std() - 1) < 1e-3


def test_a_reconstruction_is_scored_by_the_originals(original):
    shifted = reference_protocol.z_score(original + original.std(), original)
    np.testing.assert_allclose(shifted, reference_protocol.z_score(original, original) + 1, atol=1e-4)


def test_what_is_compared_is_clipped_and_at_the_published_size(original):
    compared = reference_protocol.to_compare(original, original)
    assert compared.shape == (256, 256)
    assert compared.min() == 0
    assert compared.max() == 1
    inside = reference_protocol.model_input(original)
    assert inside.min() < -0.5
    np.testing.assert_array_equal(compared, inside.clip(0, 1))


def test_a_constant_slice_has_no_deviation_to_divide_by():
    assert not reference_protocol.to_compare(np.full((256, 128), 7.0), np.full((256, 128), 7.0)).any()
