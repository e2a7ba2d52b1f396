"""Each quantizer of a configuration is given its fields, and several devices share it: they do what one does with all.

Run as a script, this file quantizes on 1, 2 and 4 devices and writes what came of it (see ``on_devices``).
"""

import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.config import ModelConfig
from vqvae_jax.models.quantizer import EMA, EMAVectorQuantizer, ProjectedQuantizer, VectorQuantizer
from vqvae_jax.models.vqvae import make_quantizer

pytestmark = pytest.mark.usefixtures("compile_fast")

AXIS = "devices"
D, K = 6, 16
OPTIONS = {
    "gradient": {},
    "projection": {"code_dim": 3},
    "averages": {"codebook_update": "ema"},
    "averages and projection": {"codebook_update": "ema", "code_dim": 3},
}

LATENTS, COTANGENT = np.random.default_rng(1).standard_normal((2, 64, D)).astype(np.float32)
LATENTS *= np.linspace(0.2, 2, 64, dtype=np.float32)[:, None]  # each device's share has other statistics


def config(option, **fields):
    return ModelConfig(embedding_dim=D, num_embeddings=K, **OPTIONS[option], **fields)


def running(option):
    """Variables of a quantizer under way, with codes among the latents, of which no latent is a tie."""
    rng = np.random.default_rng(0)
    quantizer = make_quantizer(config(option))
    variables = jax.device_get(quantizer.init(jax.random.key(0), jnp.zeros((1, D))))
    for path, leaf in jax.tree.leaves_with_path(variables):
        if path[-1].key == "codebook":
            place = variables
            for key in path[:-1]:
                place = place[key.key]
            place["codebook"] = rng.standard_normal(leaf.shape).astype(np.float32)
            if path[0].key == EMA:
                place |= {"sums": place["codebook"], "started": np.ones((), bool)}
    return variables


@pytest.mark.parametrize("option", OPTIONS)
def test_codes_alone_give_what_the_decoder_is_given(option):
    """What is stored of an image is its codes."""
    quantizer, variables = make_quantizer(config(option)), running(option)
    found = jax.jit(quantizer.apply)(variables, LATENTS)
    assert len(np.unique(found.indices)) > K // 2
    assert found.quantized.shape == LATENTS.shape
    vectors = quantizer.apply(variables, found.indices, method="lookup")
    np.testing.assert_allclose(vectors, found.quantized, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("option", "kind"), [("gradient", VectorQuantizer), ("averages", EMAVectorQuantizer)])
def test_each_field_reaches_the_quantizer(option, kind):
    quantizer = make_quantizer(config(option), AXIS)
    assert type(quantizer) is kind
    assert quantizer == kind(num_embeddings=K, codebook_dim=D, commitment_cost=0.25, axis_name=AXIS)
    projected = make_quantizer(config(option, code_dim=3), AXIS)
    assert projected == ProjectedQuantizer(quantizer.copy(codebook_dim=3), code_dim=3, embedding_dim=D)


# Several devices: each has some of the latents, and together they must do what one does with all.


def gradients(option, axis_name, mean):
    """A function of (variables, latents, cotangent): gradients of a loss, counts, and what the quantizer keeps.

    ``mean`` averages over devices; the loss is a mean over latents.
    """
    quantizer = make_quantizer(config(option), axis_name)

    def loss(params, latents, variables, cotangent):
        output, kept = quantizer.apply(
            variables | {"params": params},
            latents,
            train=True,
            mutable=[EMA],
            rngs={EMA: jax.random.key(1)},
        )
        return output.loss + jnp.mean(output.quantized * cotangent), (output, kept)

    def both(variables, latents, cotangent):
        params = variables.get("params", {})
        found, (output, kept) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, latents, variables, cotangent)
        shared = mean((found[0], output.loss, output.counts))
        return {"shared": shared, "kept": kept, "latents": found[1], "indices": output.indices}

    return both


def started(latents, devices):
    """What an EMA quantizer keeps after the k-means start on a first batch, as every device has it."""
    quantizer = EMAVectorQuantizer(K, D, axis_name=AXIS)
    variables = EMAVectorQuantizer(K, D).init(jax.random.key(0), jnp.zeros((1, D)))

    def start(variables, latents):
        return quantizer.apply(variables, latents, train=True, mutable=[EMA], rngs={EMA: jax.random.key(1)})[1]

    return jax.pmap(start, AXIS, in_axes=(None, 0), devices=devices)(variables, latents)


def on_devices():
    """What ``gradients`` gives on 2 and on 4 devices, by option, and what ``started`` does; each with a device axis."""

    def mean(tree):
        return jax.lax.pmean(tree, AXIS)

    found = {}
    for count in (2, 4):
        devices = jax.devices()[:count]
        latents, cotangent = (x.reshape(count, -1, D) for x in (LATENTS, COTANGENT))
        found["start", count] = jax.device_get(started(latents, devices))
        for option in OPTIONS:
            step = jax.pmap(gradients(option, AXIS, mean), AXIS, in_axes=(None, 0, 0), devices=devices)
            found[option, count] = jax.device_get(step(running(option), latents, cotangent))
    return found


@pytest.fixture(scope="module")
def by_devices(tmp_path_factory):
    """``on_devices`` of a process with 4 devices."""
    path = tmp_path_factory.mktemp("devices") / "found"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True)
    return pickle.loads(path.read_bytes())


def assert_same_on_all(tree, devices):
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, np.repeat(leaf[:1], devices, axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("option", OPTIONS)
def test_devices_together_do_what_one_does(by_devices, option, devices):
    """Gradients, losses and codebook of one device, which takes no means over any axis, are those of several."""
    many = by_devices[option, devices]
    one = jax.jit(gradients(option, None, lambda tree: tree))(running(option), LATENTS, COTANGENT)
    assert len(np.unique(one["indices"])) > K // 2

    def assert_close(found, expected, rtol=1e-4):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-6)

    np.testing.assert_array_equal(many["indices"].reshape(-1), one["indices"])
    assert_close(many["latents"].reshape(-1, D) / devices, one["latents"])
    assert_same_on_all((many["shared"], many["kept"]), devices)
    *shared, counts = many["shared"]
    *expected, expected_counts = one["shared"]
    jax.tree.map(lambda a, b: assert_close(a[0], b), shared, expected)
    jax.tree.map(lambda a, b: assert_close(a[0], b, rtol=1e-5), many["kept"], one["kept"])
    np.testing.assert_array_equal(counts[0] * devices, expected_counts)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_start_with_one_codebook_of_all_their_latents(by_devices, devices):
    """K-means starts from latents of each; all go on with the same codes, which lie among those of all."""
    found = by_devices["start", devices]
    assert_same_on_all(found, devices)
    kept = jax.tree.map(lambda leaf: leaf[0], found[EMA])
    assert kept["started"]
    codes = np.float64(kept["codebook"])
    chosen = ((LATENTS[:, None] - codes) ** 2).sum(-1).argmin(1)
    untrained = make_quantizer(config("averages"))
    before = untrained.apply(untrained.init(jax.random.key(0), LATENTS), LATENTS).commitment_loss
    assert np.mean((LATENTS - codes[chosen]) ** 2) < 0.5 * before
    assert len(np.unique(chosen)) > K // 2


if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        pickle.dump(on_devices(), file)
