"""The integer prior: the numbers of another implementation in NumPy's int64, whatever JAX is told."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from vqvae_jax.models import rounding
from vqvae_jax.models.prior import Prior, init_prior
from vqvae_jax.models.prior_integers import PriorProgram, to_integers

CODES, SIDE = 24, 6
PRIOR = Prior(num_embeddings=CODES, channels=16, blocks=2, neighbours=2, grid=(8, 4))


@functools.cache
def variables(seed=0, scale=1.0):
    """Of a prior that no layer of is zero."""
    found = init_prior(PRIOR, jax.random.normal(jax.random.key(seed), (CODES, 5)), jax.random.key(seed + 1))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + scale * 0.2 * rng.normal(size=leaf.shape).astype(np.float32), found)


def grids(count, seed=0, height=SIDE, width=SIDE):
    """Codes, which are known, slices before, and which there are."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, CODES, (count, height, width)).astype(np.int32)
    known = rng.random((count, height, width)) < rng.random((count, 1, 1))
    before = rng.integers(0, CODES, (count, 2, height, width)).astype(np.int32)
    return indices, known, before, rng.random((count, 2)) < 0.7


def by_int64(integers, indices, known, before, present):
    """The same network in int64: sums over kernel positions, shifts for divisions; no float anywhere."""

    def shifted(x, bits):
        return (x + (1 << bits >> 1)) >> bits

    def convolved(x, layer):
        channels = x.shape[-1]
        kernel = layer.matrix.astype(np.int64).reshape(3, 3, channels, -1)
        total = np.zeros((*x.shape[:3], kernel.shape[-1]), np.int64) + layer.bias
        height, width = x.shape[1:3]
        by = layer.dilation
        for top in (-by, 0, by):
            for left in (-by, 0, by):
                rows = slice(max(0, -top), max(0, -top, min(height, height - top)))
                columns = slice(max(0, -left), max(0, -left, min(width, width - left)))
                from_rows = slice(rows.start + top, rows.stop + top)
                from_columns = slice(columns.start + left, columns.stop + left)
                total[:, rows, columns] += x[:, from_rows, from_columns] @ kernel[top // by + 1, left // by + 1]
        return total

    def blocks(stream, kind, count):
        for number in range(count):
            first, second = (integers.layers[f"{kind}{number}_{part}"] for part in ("first", "second"))
            y = convolved(np.clip(shifted(stream, 4), 0, 127), first)
            y = convolved(np.clip(shifted(y, first.bits), 0, 127), second)
            stream = np.clip(stream + shifted(y, second.bits - 4), -32767, 32767)
        return stream

    tables = {name: table.astype(np.int64) for name, table in integers.tables.items()}
    stream = np.zeros((*indices.shape, integers.rows.shape[1]), np.int64)
    for number in range(before.shape[1]):
        given = before[:, number].copy()
        given[~present[:, number]] = CODES
        stream += tables[f"before{number}"][given]
    stream = blocks(np.clip(stream, -32767, 32767), "context", 1)
    height, width = indices.shape[1:]
    rows = [int((row + 0.5) / height * len(integers.rows)) for row in range(height)]
    columns = [int((column + 0.5) / width * len(integers.columns)) for column in range(width)]
    stream = stream + tables["codes"][np.where(known, indices, CODES)]
    stream += integers.rows.astype(np.int64)[rows][:, None] + integers.columns.astype(np.int64)[columns]
    stream = blocks(np.clip(stream, -32767, 32767), "block", 2)
    out = integers.layers["out"]
    x = np.clip(shifted(stream, 4), 0, 127)
    return shifted(x @ out.matrix.astype(np.int64) + out.bias, out.bits - 1)


def by_program(program, indices, known, before, present):
    return program.logits(indices, known, program.context(before, present))


@pytest.mark.parametrize(("height", "width"), [(6, 6), (1, 9), (8, 4)])
def test_it_is_what_int64_gives(height, width):
    integers = to_integers(PRIOR, variables())
    given = grids(5, height=height, width=width)
    found = by_program(PriorProgram(integers), *given)
    assert np.ptp(found) > 100
    np.testing.assert_array_equal(found, by_int64(integers, *given))


def test_it_is_the_rounded_network_but_for_the_rounding_of_the_stream():
    given = grids(5)
    found = by_program(PriorProgram(to_integers(PRIOR, variables())), *given) / 2**rounding.LOGIT_BITS
    rounded = PRIOR.clone(rounded=True).apply(variables(), *given)
    exact = PRIOR.apply(variables(), *given)  # whose activations are beyond 8 bits here
    assert np.abs(found - rounded).mean() < 0.2
    assert np.abs(found - rounded).mean() < 0.1 * np.abs(found - exact).mean()


def test_no_sum_reaches_what_float32_cannot_hold():
    """With the largest weights, biases and activations that there are, at the greatest width."""
    channels = 80
    sums = rounding.LARGEST**2 * 9 * channels + 2**22 + 2 ** (rounding.MOST_WEIGHT_BITS - 1)
    assert sums < 2**24
    wild = to_integers(PRIOR, jax.tree.map(lambda leaf: 1e4 * leaf, variables()))
    given = grids(2)
    np.testing.assert_array_equal(by_program(PriorProgram(wild), *given), by_int64(wild, *given))


def test_every_number_is_in_the_fingerprint():
    prints = {to_integers(PRIOR, variables()).fingerprint}
    for name, leaf in variables()["params"].items():
        place = np.unravel_index(np.argmin(np.abs(np.asarray(leaf))), leaf.shape)
        params = {**variables()["params"], name: leaf.at[place].add(0.06)}
        prints.add(to_integers(PRIOR, {"params": params}).fingerprint)
    assert len(prints) == 1 + len(variables()["params"])
    assert to_integers(PRIOR, variables()).fingerprint in prints


SETTINGS = [
    {},
    {"JAX_ENABLE_X64": "1"},
    {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
    {"JAX_DEFAULT_MATMUL_PRECISION": "float32"},
    {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"},
    {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
]
SCRIPT = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
import test_prior_integers as t
program = t.PriorProgram(t.to_integers(t.PRIOR, t.load(sys.argv[2])))
given = t.grids(int(sys.argv[3]), seed=7)
batch = int(sys.argv[4])
parts = [t.by_program(program, *(x[i:i + batch] for x in given)) for i in range(0, len(given[0]), batch)]
np.save(sys.argv[5], np.concatenate(parts).astype(np.int16))
"""


def load(path):
    with np.load(path) as file:
        return {"params": {name: jnp.asarray(file[name]) for name in file.files}}


@pytest.mark.slow
def test_10000_grids_are_the_same_whatever_jax_is_told(tmp_path):
    """Other batch sizes, 64 bits, precisions of products, one thread, no optimisation: against int64."""
    count = 10_000
    params = {name: np.asarray(leaf) for name, leaf in variables()["params"].items()}
    np.savez(tmp_path / "params.npz", **params)
    wanted = by_int64(to_integers(PRIOR, variables()), *grids(count, seed=7))
    for setting, batch in zip(SETTINGS, (1000, 500, 625, 16, 2000, 1250), strict=True):
        command = [sys.executable, "-c", SCRIPT, ROOT / "tests/models", tmp_path / "params.npz", str(count), str(batch)]
        environment = {**os.environ, **setting, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        subprocess.run([*command, tmp_path / "out.npy"], env=environment, check=True)
        np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), wanted, err_msg=str(setting))
