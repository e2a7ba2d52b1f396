"""The quantizer picks the codes a brute-force search picks, and its gradients are those of the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models.quantizer import CODEBOOK, FEWEST, EMAVectorQuantizer, VectorQuantizer, entropy_loss

K, D, COST = 16, 4, 0.25
SHAPES = [(2, 8, 4, D), (5, D), (D,), (1, 3, 5, 2, D)]


def quantizer(k=K, d=D, cost=COST, **options):
    return VectorQuantizer(num_embeddings=k, embedding_dim=d, commitment_cost=cost, **options)


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def initial(k, d):
    return jax.jit(quantizer(k, d).init)(jax.random.key(0), jnp.zeros((1, d)))


OPTIONS = ("cost", "cosine", "entropy_weight", "entropy_temperature")


def apply(codes, latents, method=None, **options):
    """What the quantizer with these codes makes of the latents."""
    variables = initial(*codes.shape)
    variables = variables | {"params": variables["params"] | {"embedding": codes}}
    return quantizer(*codes.shape, **options).apply(variables, latents, method=method)


jitted = jax.jit(apply, static_argnames=(*OPTIONS, "method"))


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
    codes = np.asarray(initial(k, D)["params"]["embedding"])
    assert codes.shape == (k, D)
    assert 0.5 / k < np.abs(codes).max() <= 1 / k
    assert codes.min() < 0 < codes.max()


@pytest.mark.parametrize("shape", [(2, 8, 4), (3,), ()])
def test_lookup_gives_the_codes(shape):
    codes = normal(K, D)
    indices = np.random.default_rng(0).integers(0, K, shape)
    np.testing.assert_array_equal(apply(codes, indices, method="lookup"), codes[indices])


# Cosine: latents and codes of length 1.


def unit(vectors):
    return np.float64(vectors) / np.linalg.norm(np.float64(vectors), axis=-1, keepdims=True)


@pytest.mark.parametrize(("shape", "jit"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False)])
def test_cosine_finds_the_smallest_angle(shape, jit):
    codes = normal(K, D) * np.geomspace(0.01, 100, K, dtype=np.float32)[:, None]
    latents = 3 * normal(*shape, seed=1)
    expected = np.argmax(unit(latents) @ unit(codes).T, axis=-1)
    found = (jitted if jit else apply)(codes, latents, cosine=True)
    np.testing.assert_array_equal(found.indices, expected)
    np.testing.assert_allclose(found.quantized, unit(codes)[expected], rtol=1e-5, atol=1e-6)
    distance = np.mean((unit(latents) - unit(codes)[expected]) ** 2)
    np.testing.assert_allclose(found.codebook_loss, distance, rtol=1e-4)
    np.testing.assert_allclose(found.loss, (1 + COST) * distance, rtol=1e-4)


def test_cosine_sees_no_length():
    """Lengths that would decide a choice by distance, as the same codes show."""
    codes, latents = normal(K, D), normal(256, D, seed=1)
    longer = codes * np.geomspace(0.01, 100, K, dtype=np.float32)[:, None]
    found, same = jitted(codes, latents, cosine=True), jitted(longer, 7 * latents, cosine=True)
    np.testing.assert_array_equal(found.indices, same.indices)
    np.testing.assert_allclose(found.quantized, same.quantized, rtol=1e-5, atol=1e-6)
    assert np.mean(np.asarray(jitted(longer, latents).indices) != found.indices) > 0.5


def test_cosine_looks_up_codes_of_length_1():
    codes = 5 * normal(K, D)
    found = apply(codes, np.arange(K), cosine=True, method="lookup")
    np.testing.assert_allclose(found, unit(codes), rtol=1e-5, atol=1e-6)


def test_cosine_gradients_pass_through_the_lengths():
    """By hand: what reaches z / |z|, less its part along z, over |z|."""
    codes, latents, cotangent = normal(K, D), normal(50, D, seed=1), normal(50, D, seed=2)
    z = unit(latents)
    chosen = np.argmax(z @ unit(codes).T, axis=-1)

    def tangent(vectors):
        return (vectors - z * (vectors * z).sum(-1, keepdims=True)) / np.linalg.norm(latents, axis=-1, keepdims=True)

    found = jax.grad(lambda z: jnp.sum(apply(codes, z, cosine=True).quantized * cotangent))(latents)
    np.testing.assert_allclose(found, tangent(cotangent), rtol=1e-4, atol=1e-5)
    found = jax.grad(lambda z: apply(codes, z, cosine=True).commitment_loss)(latents)
    np.testing.assert_allclose(found, tangent(2 * (z - unit(codes)[chosen]) / z.size), rtol=1e-4, atol=1e-6)


def test_cosine_of_a_zero_latent_is_finite():
    latents = normal(4, D) * np.float32([[1], [0], [1], [1]])
    loss, gradient = jax.value_and_grad(lambda z: apply(normal(K, D), z, cosine=True).loss)(latents)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_cosine_codes_start_with_length_1():
    codes = quantizer(512, cosine=True).init(jax.random.key(0), normal(1, D))["params"]["embedding"]
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(np.mean(codes, axis=0)) < 0.2


# Entropy of soft assignments.


def assignments(codes, latents, temperature):
    """softmax(-|z - e|^2 / temperature) by brute force: float64 [N, K]."""
    distances = ((np.float64(latents).reshape(-1, 1, D) - np.float64(codes)) ** 2).sum(-1)
    p = np.exp(-(distances - distances.min(axis=1, keepdims=True)) / temperature)
    return p / p.sum(axis=1, keepdims=True)


def entropy(p):
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


def expected_entropy_loss(codes, latents, temperature):
    p = assignments(codes, latents, temperature)
    return entropy(p).mean() - entropy(p.mean(axis=0))


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
def test_entropy_loss_is_that_of_the_soft_assignments(temperature, cosine):
    codes, latents = normal(K, D), normal(2, 8, 4, D, seed=1)
    expected = expected_entropy_loss(*((unit(codes), unit(latents)) if cosine else (codes, latents)), temperature)
    options = {"entropy_weight": 0.5, "entropy_temperature": temperature, "cosine": cosine}
    found = jitted(codes, latents, **options)
    np.testing.assert_allclose(found.entropy_loss, expected, rtol=1e-4, atol=1e-6)
    without = found.codebook_loss + COST * found.commitment_loss
    np.testing.assert_allclose(found.loss, without + 0.5 * expected, rtol=1e-4, atol=1e-6)
    assert jitted(codes, latents, cosine=cosine).entropy_loss == 0


def test_entropy_loss_lies_between_its_bounds():
    """-log K where each latent is sure of its code and all are used alike; 0 where all latents are the same."""
    codes = normal(K, D)
    np.testing.assert_allclose(entropy_loss(codes, codes, 1e-3), -np.log(K), rtol=1e-5)
    for temperature in (1e-3, 1.0):
        same = entropy_loss(np.repeat(codes[:1], 9, axis=0), codes, temperature)
        np.testing.assert_allclose(same, 0, atol=1e-5)
    assert entropy_loss(codes[:0], codes, 1.0) == 0


def test_entropy_gradient_is_the_slope():
    """Along a random direction, of latents and codes, against float64 differences."""
    codes, latents = normal(K, D), normal(40, D, seed=1)
    directions = normal(K, D, seed=2), normal(40, D, seed=3)
    found = jax.jit(jax.grad(lambda c, z: entropy_loss(z, c, 0.7), argnums=(0, 1)))(codes, latents)
    for which, direction in enumerate(directions):
        step = 1e-5 * np.float64(direction)
        moved = [[np.float64(x) for x in (codes, latents)] for _ in range(2)]
        moved[0][which] += step
        moved[1][which] -= step
        slope = np.subtract(*(expected_entropy_loss(*each, 0.7) for each in moved)) / 2e-5
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(np.sum(found[which] * direction), slope, rtol=1e-3)


def test_entropy_moves_codes_and_latents():
    codes, latents = normal(K, D), normal(40, D, seed=1)
    options = {"entropy_weight": 0.5, "entropy_temperature": 0.7, "cost": 0.0}
    found = jax.grad(lambda c, z: apply(c, z, **options).loss, argnums=(0, 1))(codes, latents)
    without = jax.grad(lambda c, z: apply(c, z, cost=0.0).loss, argnums=(0, 1))(codes, latents)
    expected = jax.grad(lambda c, z: 0.5 * entropy_loss(z, c, 0.7), argnums=(0, 1))(codes, latents)
    for total, rest, entropy_alone in zip(found, without, expected, strict=True):
        assert np.all(np.any(entropy_alone != 0, axis=1))
        np.testing.assert_allclose(total, rest + entropy_alone, rtol=1e-4, atol=1e-7)


def test_entropy_gradient_is_finite_where_nothing_chooses_a_code():
    codes = normal(K, D)
    codes[3] = 1e4
    assert assignments(codes, normal(40, D, seed=1), 0.01)[:, 3].max() == 0
    found = jax.grad(lambda c, z: entropy_loss(z, c, 0.01), argnums=(0, 1))(codes, normal(40, D, seed=1))
    assert all(np.isfinite(each).all() for each in found)


# Moving averages instead of gradients. Kept in the collection CODEBOOK: embedding, counts, sums, started.

DECAY = 0.9


def ema(k=K, **options):
    return EMAVectorQuantizer(num_embeddings=k, embedding_dim=D, commitment_cost=COST, decay=DECAY, **options)


def running(codes, counts):
    """The codebook of a quantizer under way, whose averages agree with its codes."""
    codes, counts = np.float32(codes), np.float32(counts)
    return {"embedding": codes, "counts": counts, "sums": codes * counts[:, None], "started": np.ones((), bool)}


@functools.partial(jax.jit, static_argnames=("cosine", "kmeans", "revive_below"))
def ema_step(codebook, latents, **options):
    """Output and new codebook of one training step."""
    quantizer = ema(len(codebook["counts"]), **options)
    rngs = {CODEBOOK: jax.random.key(0)}
    output, new = quantizer.apply({CODEBOOK: codebook}, latents, train=True, mutable=CODEBOOK, rngs=rngs)
    return output, new[CODEBOOK]


def test_moving_averages_are_those_of_the_paper():
    """N <- d N + (1 - d) n, m <- d m + (1 - d) S, e = m / N, from the codes chosen before the step."""
    codes, counts, latents = normal(K, D), 1 + np.arange(K), normal(2, 8, 4, D, seed=1)
    output, found = ema_step(running(codes, counts), latents)
    chosen = nearest(codes, latents)
    sums = np.zeros((K, D))
    np.add.at(sums, chosen, latents)
    new_counts = DECAY * counts + (1 - DECAY) * np.bincount(chosen.ravel(), minlength=K)
    new_sums = DECAY * codes * counts[:, None] + (1 - DECAY) * sums
    assert new_counts.min() > EMAVectorQuantizer.revive_below * new_counts.mean()
    np.testing.assert_array_equal(output.indices, chosen)
    np.testing.assert_allclose(output.quantized, codes[chosen], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["counts"], new_counts, rtol=1e-5)
    np.testing.assert_allclose(found["sums"], new_sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["embedding"], new_sums / new_counts[:, None], rtol=1e-5, atol=1e-5)


def test_dead_codes_become_latents_and_stay_alive():
    codes, latents = normal(K, D), normal(64, D, seed=1)
    codes[3] = 1e4
    counts = np.ones(K)
    counts[3] = 1e-3
    _, found = ema_step(running(codes, counts), latents)
    assert np.abs(latents - found["embedding"][3]).max(axis=1).min() < 1e-5
    assert found["counts"][3] > 10 * EMAVectorQuantizer.revive_below * np.mean(found["counts"])
    np.testing.assert_allclose(found["sums"], found["embedding"] * found["counts"][:, None], rtol=1e-5, atol=1e-5)
    _, after = ema_step(found, normal(64, D, seed=2))
    assert np.abs(after["embedding"]).max() < 10


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_codes_below_the_share_are_revived_and_no_others(share):
    """Nine codes that no latent chooses, with averages from 0.05 to 0.9 of those of the others."""
    codes, latents = normal(K, D), normal(64, D, seed=1)
    codes[:9] = 1e4
    counts = np.full(K, 64 / K)
    counts[:9] *= np.linspace(0.05, 0.9, 9)
    _, found = ema_step(running(codes, counts), latents, revive_below=share)
    averages = DECAY * counts + (1 - DECAY) * np.bincount(nearest(codes, latents), minlength=K)
    revived = np.abs(np.asarray(found["embedding"])[:9]).max(axis=1) < 10
    np.testing.assert_array_equal(revived, (averages < share * averages.mean())[:9])
    assert np.any(revived) == (share > 0)
    assert not np.all(revived)


def test_a_code_that_is_never_chosen_or_revived_stays_where_it_is():
    """Its averages vanish in float32; when latents come to it again, it becomes their mean."""
    codes, latents = normal(K, D), normal(64, D, seed=1)
    codes[3] = 50
    codebook = running(codes, np.ones(K))
    for _ in range(1200):
        _, codebook = ema_step(codebook, latents, revive_below=0.0)
    assert codebook["counts"][3] < FEWEST**2
    np.testing.assert_allclose(codebook["embedding"][3], 50, rtol=1e-3)
    back = 60 + normal(64, D, seed=2)
    _, codebook = ema_step(codebook, back, revive_below=0.0)
    np.testing.assert_allclose(codebook["embedding"][3], back.mean(axis=0), rtol=1e-5)


def test_without_k_means_the_first_batch_moves_the_codes_as_any_other():
    latents = 5 + normal(256, D)
    initial = jax.device_get(jax.jit(ema(kmeans=False).init)(jax.random.key(0), latents)[CODEBOOK])
    chosen = nearest(initial["embedding"], latents)
    output, found = ema_step(initial, latents, kmeans=False, revive_below=0.0)
    np.testing.assert_array_equal(output.indices, chosen)
    counts, sums = DECAY * np.ones(K), DECAY * np.float64(initial["embedding"])
    np.add.at(counts, chosen, 1 - DECAY)
    np.add.at(sums, chosen, (1 - DECAY) * latents)
    np.testing.assert_allclose(found["embedding"], sums / counts[:, None], rtol=1e-4, atol=1e-6)


def test_first_batch_sets_the_codes_and_later_ones_move_them():
    """Latents far from the initial codes: k-means brings the codes among them at once, and only once."""
    latents = 5 + normal(256, D)
    initial = jax.jit(ema().init)(jax.random.key(0), latents)[CODEBOOK]
    assert not initial["started"]
    assert np.abs(initial["embedding"]).max() <= 1 / K
    first, codebook = ema_step(initial, latents)
    assert codebook["started"]
    assert np.all(first.counts > 0)
    assert first.commitment_loss < 0.5 * latents.var()  # the best single code would leave the variance
    second, codebook = ema_step(codebook, latents)
    assert second.commitment_loss < 1.05 * first.commitment_loss
    again = ema_step(initial, latents)[1]["embedding"]
    assert np.any(codebook["embedding"] != again)


def test_evaluation_and_initialisation_leave_the_codebook_alone():
    codebook, latents = running(normal(K, D), np.ones(K)), normal(64, D, seed=1)
    output, new = jax.jit(lambda c, z: ema().apply({CODEBOOK: c}, z, mutable=CODEBOOK))(codebook, latents)
    jax.tree.map(np.testing.assert_array_equal, new[CODEBOOK], codebook)
    np.testing.assert_array_equal(output.indices, nearest(codebook["embedding"], latents))
    init = jax.jit(ema().init, static_argnames="train")
    initial = (init(jax.random.key(0), latents, train=train)[CODEBOOK] for train in (False, True))
    jax.tree.map(np.testing.assert_array_equal, *initial)


def test_moving_averages_leave_only_the_commitment_term():
    codebook, latents = running(normal(K, D), np.ones(K)), normal(2, 8, 4, D, seed=1)
    output, _ = ema_step(codebook, latents)
    assert output.codebook_loss == 0
    np.testing.assert_allclose(output.loss, COST * output.commitment_loss, rtol=1e-6)
    found = jax.grad(lambda z: ema_step(codebook, z)[0].loss)(latents)
    np.testing.assert_allclose(
        found, COST * expected_gradients(codebook["embedding"], latents)[1], rtol=1e-5, atol=1e-8
    )


def test_moving_averages_of_directions_keep_length_1():
    """One step as by hand; after many, the running sums are still no longer than the counts."""
    codes, latents = np.float32(unit(normal(K, D))), 5 * normal(256, D, seed=1)
    output, found = ema_step(running(codes, np.ones(K)), latents, cosine=True)
    chosen = np.argmax(unit(latents) @ unit(codes).T, axis=-1)
    sums = np.zeros((K, D))
    np.add.at(sums, chosen, unit(latents))
    np.testing.assert_array_equal(output.indices, chosen)
    np.testing.assert_allclose(output.quantized, codes[chosen], rtol=1e-5, atol=1e-6)
    expected = unit(DECAY * codes + (1 - DECAY) * sums)
    np.testing.assert_allclose(found["embedding"], expected, rtol=1e-4, atol=1e-5)
    for seed in range(2, 12):
        _, found = ema_step(found, 5 * normal(256, D, seed=seed), cosine=True)
    np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1, rtol=1e-5)
    assert np.all(np.linalg.norm(found["sums"], axis=1) <= found["counts"] * (1 + 1e-5))


def test_directions_are_started_and_revived_as_directions():
    latents = 5 * normal(256, D, seed=1)
    initial = ema(cosine=True).init(jax.random.key(0), latents)[CODEBOOK]
    first, codebook = ema_step(initial, latents, cosine=True)
    np.testing.assert_allclose(np.linalg.norm(codebook["embedding"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(first.quantized, axis=1), 1, rtol=1e-5)
    assert np.all(first.counts > 0)
    untrained = ema(cosine=True).apply({CODEBOOK: initial}, latents)
    assert first.commitment_loss < 0.8 * untrained.commitment_loss
    codebook = running(unit(normal(K, D)), np.ones(K))
    codebook["counts"][3], codebook["sums"][3] = 0, 0
    codebook["embedding"][3] = 1e4  # chosen by no latent
    _, found = ema_step(codebook, latents[:64], cosine=True)
    assert np.abs(unit(latents) - found["embedding"][3]).max(axis=1).min() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1, rtol=1e-5)
