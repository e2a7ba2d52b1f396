"""The prior in integers: the same logits on every machine, whatever the order of its sums (docs/vqz.md).

All numbers are whole, and float32 holds whole numbers below 2**24 exactly. A convolution is a product of patches
[.., 9 C] and a matrix [9 C, C'] of 8-bit numbers. Its sums stay below 127 * 127 * 9 C + 2**22 < 2**24, in any order.
Dividing by a power of two is exact too, and so is rounding down.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.models import rounding
from vqvae_jax.models.prior import Prior, dilation_of, nearest_of
from vqvae_jax.runtime import compilation

BIAS_LARGEST = 2**22
"""Largest magnitude of a bias, in units of a layer's sums."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """``matrix`` int8 [inputs, outputs], ``bias`` int32 [outputs], ``bits``, the fraction of a weight, and dilation."""

    matrix: np.ndarray
    bias: np.ndarray
    bits: int
    dilation: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerPrior:
    """What the integer prior computes with.

    Attributes:
      tables: int16 [K + 1, C] by name: ``codes``, ``before0`` and so on; units of the residual stream.
      rows, columns: int16 [number, C], vectors of rows and columns.
      layers: by name: ``context0_first``, ``context0_second``, ..., ``block0_first``, ..., ``out``.
    """

    tables: dict[str, np.ndarray]
    rows: np.ndarray
    columns: np.ndarray
    layers: dict[str, Layer]

    @property
    def num_embeddings(self) -> int:
        """K."""
        return len(self.tables["codes"]) - 1

    @property
    def neighbours(self) -> int:
        """How many slices before are given."""
        return len(self.tables) - 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of every number, and of the rules by which they are used."""
        rules = (rounding.LARGEST, rounding.ACTIVATION_BITS, rounding.STREAM_BITS, rounding.LOGIT_BITS)
        digest = hashlib.sha256(f"prior 1 {rules}".encode())
        arrays = {**self.tables, "rows": self.rows, "columns": self.columns}
        for name, layer in self.layers.items():
            arrays |= {f"{name} {field}": value for field, value in vars(layer).items()}
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {np.shape(array)}".encode())
            digest.update(np.asarray(array, "<i4").tobytes())
        return digest.hexdigest()


def to_integers(prior: Prior, variables: Any) -> IntegerPrior:
    """The integers of a prior's variables: each float32 rounded by itself, so alike on every machine."""
    params = {name: np.asarray(value, np.float64) for name, value in variables["params"].items()}
    in_stream = {
        name: _nearest(value, rounding.STREAM_BITS, rounding.STREAM_LARGEST).astype(np.int16)
        for name, value in params.items()
        if name.endswith("_table") or name in ("rows", "columns")
    }
    rows, columns = in_stream.pop("rows"), in_stream.pop("columns")
    blocks = [f"context{number}" for number in range(prior.context_blocks)]
    blocks += [f"block{number}" for number in range(prior.blocks)]
    names = [f"{block}_{part}" for block in blocks for part in ("first", "second")]
    layers = {name: _layer(params[f"{name}_kernel"], params[f"{name}_bias"]) for name in (*names, "out")}
    for number in range(prior.blocks):
        name = f"block{number}_first"
        layers[name] = dataclasses.replace(layers[name], dilation=dilation_of(number))
    tables = {name.removesuffix("_table"): value for name, value in in_stream.items()}
    return IntegerPrior(tables, rows, columns, layers)


class PriorProgram:
    """The integer prior compiled: logits of any grids, on the device that JAX has.

    Args:
      prior: the integers.
    """

    def __init__(self, prior: IntegerPrior):
        self.prior = prior
        arrays = {name: jnp.asarray(table, jnp.float32) for name, table in prior.tables.items()}
        arrays |= {"rows": jnp.asarray(prior.rows, jnp.float32), "columns": jnp.asarray(prior.columns, jnp.float32)}
        for name, layer in prior.layers.items():
            arrays[f"{name}_matrix"] = jnp.asarray(layer.matrix, jnp.float32)
            arrays[f"{name}_bias"] = jnp.asarray(layer.bias, jnp.float32)
        self._arrays = arrays
        self._context = compilation.jit(functools.partial(_context, prior))
        self._logits = compilation.jit(functools.partial(_logits, prior))

    def context(self, before: np.ndarray, present: np.ndarray) -> jax.Array:
        """What the slices before, int32 [N, neighbours, h, w], say: float32 [N, h, w, C] of integers.

        ``present`` is bool [N, neighbours].
        """
        return self._context(self._arrays, np.asarray(before, np.int32), np.asarray(present, bool))

    def logits(self, indices: np.ndarray, known: np.ndarray, context: jax.Array) -> np.ndarray:
        """Logits int32 [N, h, w, K], in units of 2**-5, of codes int32 [N, h, w], of which some are known."""
        return np.asarray(self._logits(self._arrays, np.asarray(indices, np.int32), np.asarray(known, bool), context))


def _nearest(x: np.ndarray, bits: int, largest: int) -> np.ndarray:
    return np.clip(np.floor(x * 2.0**bits + 0.5), -largest, largest).astype(np.int64)


def _layer(kernel: np.ndarray, bias: np.ndarray) -> Layer:
    """A kernel [3, 3, C, C'] or [C, C'] in 8 bits, with as many fractional bits as its largest weight allows."""
    bits, largest = rounding.MOST_WEIGHT_BITS, np.abs(kernel).max()
    while bits > rounding.LEAST_WEIGHT_BITS and largest * 2.0**bits > rounding.LARGEST:
        bits -= 1
    matrix = _nearest(kernel.reshape(-1, kernel.shape[-1]), bits, rounding.LARGEST)
    return Layer(
        matrix.astype(np.int8),
        _nearest(bias, bits + rounding.ACTIVATION_BITS, BIAS_LARGEST).astype(np.int32),
        bits,
    )


def _context(prior: IntegerPrior, arrays: dict, before: jax.Array, present: jax.Array) -> jax.Array:
    unknown = prior.num_embeddings
    stream = jnp.float32(0)
    for number in range(prior.neighbours):
        given = jnp.where(present[:, number, None, None], before[:, number], unknown)
        stream += jnp.take(arrays[f"before{number}"], given, axis=0)
    return _blocks(prior, arrays, _clip(stream), "context")


def _logits(prior: IntegerPrior, arrays: dict, indices: jax.Array, known: jax.Array, context: jax.Array) -> jax.Array:
    rows = arrays["rows"][nearest_of(indices.shape[1], len(prior.rows))]
    columns = arrays["columns"][nearest_of(indices.shape[2], len(prior.columns))]
    stream = context + jnp.take(arrays["codes"], jnp.where(known, indices, prior.num_embeddings), axis=0)
    stream = _blocks(prior, arrays, _clip(stream + rows[:, None] + columns), "block")
    x = _activation(stream, rounding.STREAM_BITS - rounding.ACTIVATION_BITS)
    shift = prior.layers["out"].bits + rounding.ACTIVATION_BITS - rounding.LOGIT_BITS
    return _shifted(x @ arrays["out_matrix"] + arrays["out_bias"], shift).astype(jnp.int32)


def _blocks(prior: IntegerPrior, arrays: dict, stream: jax.Array, kind: str) -> jax.Array:
    for name in [name.removesuffix("_first") for name in prior.layers if name.startswith(kind) and "_first" in name]:
        first, second = f"{name}_first", f"{name}_second"
        x = _activation(stream, rounding.STREAM_BITS - rounding.ACTIVATION_BITS)
        x = _activation(_convolve(x, arrays, first, prior.layers[first].dilation), prior.layers[first].bits)
        shift = prior.layers[second].bits + rounding.ACTIVATION_BITS - rounding.STREAM_BITS
        stream = _clip(stream + _shifted(_convolve(x, arrays, second), shift))
    return stream


def _convolve(x: jax.Array, arrays: dict, name: str, dilation: int = 1) -> jax.Array:
    """3 x 3, padded with 0, as a product of patches [N, h, w, 9 C] and a matrix [9 C, C']."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (dilation, dilation), (dilation, dilation), (0, 0)))
    starts = (0, dilation, 2 * dilation)
    patches = [padded[:, top : top + height, left : left + width] for top in starts for left in starts]
    return jnp.concatenate(patches, axis=-1) @ arrays[f"{name}_matrix"] + arrays[f"{name}_bias"]


def _shifted(x: jax.Array, bits: int) -> jax.Array:
    """``x`` / 2**bits, to the nearest integer; a half goes up."""
    return jnp.floor((x + 2.0**bits / 2) / 2.0**bits) if bits else x


def _activation(x: jax.Array, bits: int) -> jax.Array:
    return jnp.clip(_shifted(x, bits), 0, rounding.LARGEST)


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -rounding.STREAM_LARGEST, rounding.STREAM_LARGEST)
