"""The quantizer picks the codes a brute-force search picks, and its gradients are those of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models.quantizer import (
    DEAD_BELOW,
    DECAY,
    EMA,
    EMAVectorQuantizer,
    ProjectedQuantizer,
    VectorQuantizer,
    straight_through,
)

K, D, COST = 16, 4, 0.25
SHAPES = [(2, 8, 4, D), (5, D), (D,), (1, 3, 5, 2, D)]


def quantizer(k=K, d=D, cost=COST):
    return VectorQuantizer(num_embeddings=k, codebook_dim=d, commitment_cost=cost)


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def initial(k, d):
    return jax.jit(quantizer(k, d).init)(jax.random.key(0), jnp.zeros((1, d)))


def apply(codes, latents, method=None, cost=COST):
    """What the quantizer with these codes makes of the latents."""
    return quantizer(*codes.shape, cost).apply({"params": {"codebook": codes}}, latents, method=method)


jitted = jax.jit(apply, static_argnames=("cost", "method"))


def nearest(codes, latents):
    """Brute force: every distance in float64; argmin takes the lowest of equals."""
    difference = latents[..., None, :].astype(np.float64) - codes.astype(np.float64)
    return np.argmin((difference**2).sum(-1), axis=-1)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_finds_what_brute_force_finds(shape, jit):
    codes, latents = normal(K, D), normal(*shape, seed=1)
    expected = nearest(codes, latents)
    found = (jitted if jit else apply)(codes, latents)
    assert found.indices.dtype == jnp.int32
    np.testing.assert_array_equal(found.indices, expected)
    np.testing.assert_allclose(found.quantized, codes[expected], rtol=1e-6, atol=1e-6)


def test_finds_what_brute_force_finds_among_many():
    codes, latents = normal(512, 64), normal(1000, 64, seed=1)
    np.testing.assert_array_equal(jitted(codes, latents).indices, nearest(codes, latents))


def test_equal_codes_give_the_lowest_index():
    codes = np.repeat(normal(K // 4, D), 4, axis=0)
    found = np.asarray(jitted(codes, normal(64, D, seed=1)).indices)
    np.testing.assert_array_equal(found % 4, 0)
    assert len(np.unique(found)) > 1


def test_a_code_is_nearest_to_itself():
    codes = normal(K, D)
    found = jitted(codes, codes)
    np.testing.assert_array_equal(found.indices, np.arange(K))
    assert found.loss == 0


def test_gradient_passes_straight_through():
    """quantized = codes in value, latents in gradient: the latents get exactly the cotangent, the codes nothing."""
    codes, latents, cotangent = normal(K, D), normal(2, 8, 4, D, seed=1), normal(2, 8, 4, D, seed=2)
    found = jax.jit(jax.grad(lambda c, z: jnp.sum(apply(c, z).quantized * cotangent), argnums=(0, 1)))(codes, latents)
    np.testing.assert_array_equal(found[1], cotangent)
    np.testing.assert_array_equal(found[0], 0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 2), (3,), (7, 64)])
def test_straight_through_is_the_identity_to_gradients(shape):
    latents, codes, cotangent = (normal(*shape, seed=seed) for seed in range(3))
    value, pull_back = jax.vjp(straight_through, latents, codes)
    to_latents, to_codes = pull_back(cotangent)
    np.testing.assert_allclose(value, codes, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(to_latents, cotangent)
    np.testing.assert_array_equal(to_codes, 0)


def expected_gradients(codes, latents):
    """By hand, for mean((z - e)^2) over n numbers: 2 (z - e) / n for z; minus its sum over a code's z for e."""
    chosen = nearest(codes, latents)
    per_latent = 2 * (latents - codes[chosen]).astype(np.float64) / latents.size
    per_code = np.zeros(codes.shape)
    np.add.at(per_code, chosen, -per_latent)
    return per_code, per_latent


@pytest.mark.parametrize(
    ("term", "codes_move", "latents_move"),
    [("codebook_loss", 1, 0), ("commitment_loss", 0, 1), ("loss", 1, COST)],
)
def test_each_term_moves_what_it_should(term, codes_move, latents_move):
    codes, latents = normal(K, D), normal(2, 8, 4, D, seed=1)
    found = jax.jit(jax.grad(lambda c, z: getattr(apply(c, z), term), argnums=(0, 1)))(codes, latents)
    per_code, per_latent = expected_gradients(codes, latents)
    np.testing.assert_allclose(found[0], codes_move * per_code, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found[1], latents_move * per_latent, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cost", [0.0, 0.25, 2.0])
def test_loss_is_codebook_plus_weighted_commitment(cost):
    codes, latents = normal(K, D), normal(2, 8, 4, D, seed=1)
    distance = np.mean((latents - codes[nearest(codes, latents)]) ** 2)
    found = jitted(codes, latents, cost=cost)
    np.testing.assert_allclose(found.codebook_loss, distance, rtol=1e-6)
    np.testing.assert_allclose(found.commitment_loss, distance, rtol=1e-6)
    np.testing.assert_allclose(found.loss, (1 + cost) * distance, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_how_often_each_code_was_chosen(shape):
    found = jitted(normal(K, D), normal(*shape, seed=1))
    assert np.sum(found.counts) == np.prod(shape[:-1])
    np.testing.assert_array_equal(found.counts, np.bincount(np.ravel(found.indices), minlength=K))


@pytest.mark.parametrize("width", [D - 1, D + 1, 2 * D])
def test_wrong_width_raises(width):
    with pytest.raises(ValueError, match=str(D)):
        apply(normal(K, D), normal(2, 8, 4, width))


@pytest.mark.parametrize("jit", [True, False])
def test_empty_batch(jit):
    found = (jitted if jit else apply)(normal(K, D), np.zeros((0, 8, 4, D), np.float32))
    assert found.quantized.shape == (0, 8, 4, D)
    assert found.indices.shape == (0, 8, 4)
    assert found.loss == 0
    assert found.counts.shape == (K,)
    assert not np.any(found.counts)


def test_bfloat16_latents_choose_as_their_float32_values_do():
    """Close codes: distances in bfloat16 would choose others, as the brute force in bfloat16 shows."""
    codes = 10 + 0.1 * normal(K, D)
    latents = jnp.asarray(10 + 0.1 * normal(256, D, seed=1), jnp.bfloat16)
    found = jitted(codes, latents)
    np.testing.assert_array_equal(found.indices, jitted(codes, latents.astype(jnp.float32)).indices)
    np.testing.assert_array_equal(found.indices, nearest(codes, np.float32(latents)))
    rounded = nearest(np.float32(jnp.asarray(codes, jnp.bfloat16)), np.float32(latents))
    assert (np.asarray(found.indices) != rounded).any()
    assert found.quantized.dtype == jnp.bfloat16
    assert found.loss.dtype == jnp.float32


@pytest.mark.parametrize("k", [2, K, 512])
def test_codes_start_within_one_kth(k):
    codes = np.asarray(initial(k, D)["params"]["codebook"])
    assert codes.shape == (k, D)
    assert 0.5 / k < np.abs(codes).max() <= 1 / k
    assert codes.min() < 0 < codes.max()


@pytest.mark.parametrize("shape", [(2, 8, 4), (3,), ()])
def test_lookup_gives_the_codes(shape):
    codes = normal(K, D)
    indices = np.random.default_rng(0).integers(0, K, shape)
    np.testing.assert_array_equal(apply(codes, indices, method="lookup"), codes[indices])


# Moving averages instead of gradients. Kept in the collection EMA: codebook, counts, sums, started.


def ema(k=K):
    return EMAVectorQuantizer(num_embeddings=k, codebook_dim=D, commitment_cost=COST)


def running(codes, counts):
    """What a quantizer under way keeps, with averages that agree with its codes."""
    codes, counts = np.float32(codes), np.float32(counts)
    return {"codebook": codes, "counts": counts, "sums": codes * counts[:, None], "started": np.ones((), bool)}


@jax.jit
def ema_step(kept, latents):
    """Output of one training step, and what is kept after it."""
    quantizer, rngs = ema(len(kept["counts"])), {EMA: jax.random.key(0)}
    output, new = quantizer.apply({EMA: kept}, latents, train=True, mutable=EMA, rngs=rngs)
    return output, new[EMA]


def test_moving_averages_are_those_of_the_paper():
    """N <- d N + (1 - d) n, m <- d m + (1 - d) S, e = m / N, from the codes chosen before the step."""
    codes, counts, latents = normal(K, D), 1 + np.arange(K), normal(2, 8, 4, D, seed=1)
    output, found = ema_step(running(codes, counts), latents)
    chosen = nearest(codes, latents)
    sums = np.zeros((K, D))
    np.add.at(sums, chosen, latents)
    new_counts = DECAY * counts + (1 - DECAY) * np.bincount(chosen.ravel(), minlength=K)
    new_sums = DECAY * codes * counts[:, None] + (1 - DECAY) * sums
    assert new_counts.min() > DEAD_BELOW * new_counts.mean()
    np.testing.assert_array_equal(output.indices, chosen)
    np.testing.assert_allclose(output.quantized, codes[chosen], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["counts"], new_counts, rtol=1e-5)
    np.testing.assert_allclose(found["sums"], new_sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["codebook"], new_sums / new_counts[:, None], rtol=1e-5, atol=1e-5)


def test_dead_codes_become_latents_and_stay_alive():
    codes, latents = normal(K, D), normal(64, D, seed=1)
    codes[3] = 1e4
    counts = np.ones(K)
    counts[3] = 1e-3
    _, found = ema_step(running(codes, counts), latents)
    assert np.abs(latents - found["codebook"][3]).max(axis=1).min() < 1e-5
    assert found["counts"][3] > 10 * DEAD_BELOW * np.mean(found["counts"])
    np.testing.assert_allclose(found["sums"], found["codebook"] * found["counts"][:, None], rtol=1e-5, atol=1e-5)
    _, after = ema_step(found, normal(64, D, seed=2))
    assert np.abs(after["codebook"]).max() < 10


def test_codes_below_the_share_are_revived_and_no_others():
    """Nine codes that no latent chooses, with averages from a tenth to twice of what is dead."""
    codes, latents = normal(K, D), normal(64, D, seed=1)
    codes[:9] = 1e4
    counts = np.full(K, 64 / K)
    counts[:9] *= np.linspace(0.1, 2, 9) * DEAD_BELOW
    _, found = ema_step(running(codes, counts), latents)
    averages = DECAY * counts + (1 - DECAY) * np.bincount(nearest(codes, latents), minlength=K)
    revived = np.abs(np.asarray(found["codebook"])[:9]).max(axis=1) < 10
    np.testing.assert_array_equal(revived, (averages < DEAD_BELOW * averages.mean())[:9])
    assert np.any(revived)
    assert not np.all(revived)


def test_first_batch_sets_the_codes_and_later_ones_move_them():
    """Latents far from the initial codes: k-means brings the codes among them at once, and only once."""
    latents = 5 + normal(256, D)
    initial = jax.jit(ema().init)(jax.random.key(0), latents)[EMA]
    assert not initial["started"]
    assert np.abs(initial["codebook"]).max() <= 1 / K
    first, kept = ema_step(initial, latents)
    assert kept["started"]
    assert np.all(first.counts > 0)
    assert first.commitment_loss < 0.5 * latents.var()  # the best single code would leave the variance
    second, kept = ema_step(kept, latents)
    assert second.commitment_loss < 1.05 * first.commitment_loss
    again = ema_step(initial, latents)[1]["codebook"]
    assert np.any(kept["codebook"] != again)


def test_evaluation_and_initialisation_leave_the_codebook_alone():
    kept, latents = running(normal(K, D), np.ones(K)), normal(64, D, seed=1)
    output, new = jax.jit(lambda c, z: ema().apply({EMA: c}, z, mutable=EMA))(kept, latents)
    jax.tree.map(np.testing.assert_array_equal, new[EMA], kept)
    np.testing.assert_array_equal(output.indices, nearest(kept["codebook"], latents))
    init = jax.jit(ema().init, static_argnames="train")
    initial = (init(jax.random.key(0), latents, train=train)[EMA] for train in (False, True))
    jax.tree.map(np.testing.assert_array_equal, *initial)


def test_moving_averages_leave_only_the_commitment_term():
    kept, latents = running(normal(K, D), np.ones(K)), normal(2, 8, 4, D, seed=1)
    output, _ = ema_step(kept, latents)
    assert output.codebook_loss == 0
    np.testing.assert_allclose(output.loss, COST * output.commitment_loss, rtol=1e-6)
    found = jax.grad(lambda z: ema_step(kept, z)[0].loss)(latents)
    np.testing.assert_allclose(found, COST * expected_gradients(kept["codebook"], latents)[1], rtol=1e-5, atol=1e-8)


# Between two projections.

WIDTH = 2


def projected():
    """A quantizer of codes of width 2 for latents of width D, and variables: codes among the projected latents."""
    module = ProjectedQuantizer(VectorQuantizer(K, WIDTH), WIDTH, D)
    variables = jax.device_get(module.init(jax.random.key(0), normal(1, D)))
    params = variables["params"]
    params["quantizer"]["codebook"] = normal(K, WIDTH)
    params["project_in"]["bias"], params["project_out"]["bias"] = normal(WIDTH, seed=1), normal(D, seed=2)
    return module, variables


def project(params, vectors):
    return np.float64(vectors) @ params["kernel"] + params["bias"]


def test_codes_are_chosen_within_and_returned_projected_back():
    module, variables = projected()
    params, latents = variables["params"], normal(2, 8, 4, D, seed=3)
    codes = params["quantizer"]["codebook"]
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


def test_both_projections_and_the_latents_learn_from_the_decoder():
    module, latents, cotangent = (
        ProjectedQuantizer(VectorQuantizer(K, WIDTH), WIDTH, D),
        normal(50, D),
        normal(50, D, seed=1),
    )
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
def test_a_wrong_width_is_refused_before_it_is_projected(width):
    with pytest.raises(ValueError, match=f"must end in the width {D}"):
        projected()[0].init(jax.random.key(0), normal(2, width))
