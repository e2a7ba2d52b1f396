"""The prior: given any of a grid's codes and the slices before, a distribution over each of the other codes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.models import rounding
from vqvae_jax.models.batch_norm import add_bias

COARSEST = 16
"""Stride of the lattice that the coding order begins with."""
MOST_DILATION = 8
"""Largest distance between the columns of a kernel."""
TABLE_SCALE = 0.5
"""Standard deviation of the vectors that stand for codes, at the start."""


def coding_order(height: int, width: int) -> np.ndarray:
    """The pass in which each position of a grid is coded: int32 [height, width], from 0.

    Pass 0 is a lattice of stride 16. Three passes halve the stride: the middles of its squares, then the middles of
    its vertical sides, then those of its horizontal ones. After 13 passes all is coded. A position's four nearest
    neighbours of the lattice so far, where they lie inside, come before it.
    """
    order = np.full((height, width), -1, np.int32)
    order[::COARSEST, ::COARSEST] = 0
    stride, number = COARSEST, 1
    while stride > 1:
        half = stride // 2
        for top, left in ((half, half), (half, 0), (0, half)):
            order[top::stride, left::stride] = number
            number += 1
        stride = half
    return order


PASSES = 1 + 3 * (COARSEST.bit_length() - 1)
"""Passes of the coding order, some of them empty on small grids."""


class Prior(nn.Module):
    """A masked convolutional model of codes (van den Oord et al. 2017, arXiv:1711.00937, section 3.3, have PixelCNN).

    Any codes may be known, as for MaskGIT (Chang et al. 2022, arXiv:2202.04200). Known codes and the slices before
    are vectors of learned tables. The slices before pass ``context_blocks`` residual blocks, which need not be
    computed again for each pass. ``blocks`` more take their sum with the known codes and vectors of row and column.
    Blocks are pre-activated and without norm, so that they can run in integers (`prior_integers`). The first kernel of
    block n is dilated by 2**n, at most 8: early passes know few codes, which lie far apart.

    Attributes:
      num_embeddings: K.
      channels: width of everything; at most 80, so that integer sums of 9 * channels products stay below 2**24.
      blocks, context_blocks: residual blocks of two 3 x 3 convolutions.
      neighbours: how many slices before are given.
      grid: height and width for which vectors of rows and columns are learned.
      rounded: compute with 8-bit weights and activations, as the integers do.

    Example:
      >>> prior = Prior(num_embeddings=512, grid=(32, 32))
      >>> indices = jnp.zeros((2, 32, 32), jnp.int32)
      >>> before, present = jnp.zeros((2, 1, 32, 32), jnp.int32), jnp.ones((2, 1), bool)
      >>> variables = prior.init(jax.random.key(0), indices, indices > 0, before, present)
      >>> prior.apply(variables, indices, indices > 0, before, present).shape
      (2, 32, 32, 512)
    """

    num_embeddings: int
    channels: int = 64
    blocks: int = 4
    context_blocks: int = 1
    neighbours: int = 1
    grid: tuple[int, int] = (32, 32)
    rounded: bool = False

    @nn.compact
    def __call__(self, indices: jax.Array, known: jax.Array, before: jax.Array, present: jax.Array) -> jax.Array:
        """Logits float32 [N, h, w, K] of every position's code.

        Args:
          indices: int32 [N, h, w]; where not known, any numbers.
          known: bool [N, h, w].
          before: int32 [N, neighbours, h, w], the slice before, the one before that, and so on.
          present: bool [N, neighbours], which of them there are.
        """
        height, width = indices.shape[1:]
        unknown = self.num_embeddings  # the table's last vector
        context = 0.0
        for number in range(self.neighbours):
            given = jnp.where(present[:, number, None, None], before[:, number], unknown)
            context += jnp.take(self._table(f"before{number}"), given, axis=0)
        for number in range(self.context_blocks):
            context = self._block(context, f"context{number}")
        stream = context + jnp.take(self._table("codes"), jnp.where(known, indices, unknown), axis=0)
        rows = self.param("rows", nn.initializers.normal(0.1), (self.grid[0], self.channels))
        columns = self.param("columns", nn.initializers.normal(0.1), (self.grid[1], self.channels))
        stream += rows[nearest_of(height, self.grid[0])][:, None] + columns[nearest_of(width, self.grid[1])]
        for number in range(self.blocks):
            stream = self._block(stream, f"block{number}", dilation_of(number))
        kernel = self.param("out_kernel", nn.initializers.normal(0.05), (self.channels, self.num_embeddings))
        bias = self.param("out_bias", nn.initializers.zeros, (self.num_embeddings,))
        return add_bias(self._activation(stream) @ self._weights(kernel), bias)

    def fresh(self, key: jax.Array) -> Any:
        """Variables as ``init`` gives them, for grids of the learned size."""
        grid = jnp.zeros((1, *self.grid), jnp.int32)
        before = jnp.zeros((1, self.neighbours, *self.grid), jnp.int32)
        return self.init(key, grid, grid > 0, before, jnp.zeros((1, self.neighbours), bool))

    def shapes(self) -> Any:
        """Shapes and types of the variables."""
        return jax.eval_shape(self.fresh, jax.random.key(0))

    def _table(self, name: str) -> jax.Array:
        """A vector for each code, and one for none."""
        init = nn.initializers.normal(TABLE_SCALE)
        return self.param(f"{name}_table", init, (self.num_embeddings + 1, self.channels))

    def _block(self, x: jax.Array, name: str, dilation: int = 1) -> jax.Array:
        y = self._convolve(self._activation(x), f"{name}_first", nn.initializers.he_normal(), dilation)
        return x + self._convolve(self._activation(y), f"{name}_second", nn.initializers.zeros)

    def _convolve(self, x: jax.Array, name: str, init: Any, dilation: int = 1) -> jax.Array:
        kernel = self.param(f"{name}_kernel", init, (3, 3, self.channels, self.channels))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (self.channels,))
        layout = ("NHWC", "HWIO", "NHWC")
        sides = (dilation, dilation)
        y = jax.lax.conv_general_dilated(
            x, self._weights(kernel), (1, 1), "SAME", rhs_dilation=sides, dimension_numbers=layout
        )
        return add_bias(y, bias)

    def _activation(self, x: jax.Array) -> jax.Array:
        return rounding.activation(x) if self.rounded else nn.relu(x)

    def _weights(self, x: jax.Array) -> jax.Array:
        return rounding.weights(x) if self.rounded else x


def dilation_of(block: int) -> int:
    """Dilation of the first kernel of a block, by its number."""
    return min(2**block, MOST_DILATION)


def nearest_of(count: int, learned: int) -> np.ndarray:
    """For each of ``count`` rows, the one of ``learned`` rows at the same share of the grid's height: int [count]."""
    return (2 * np.arange(count) + 1) * learned // (2 * count)


def init_prior(prior: Prior, codebook: jax.Array, key: jax.Array) -> Any:
    """Fresh variables, in which codes that are near in the codebook [K, D] have vectors that are near.

    Tables and the output's kernel start as random projections of the codebook; later each goes its own way.
    """
    params = dict(prior.fresh(key)["params"])
    codes = codebook - jnp.mean(codebook, axis=0)
    codes /= jnp.sqrt(jnp.mean(jnp.sum(codes**2, axis=1))) + 1e-12
    for number, name in enumerate(sorted(name for name in params if name.endswith("_table"))):
        projection = jax.random.normal(jax.random.fold_in(key, number), (codes.shape[1], prior.channels))
        params[name] = params[name].at[:-1].multiply(0.5).at[:-1].add(TABLE_SCALE * codes @ projection)
    projection = jax.random.normal(jax.random.fold_in(key, len(params)), (codes.shape[1], prior.channels))
    params["out_kernel"] = 0.1 * (codes @ projection).T + 0.5 * params["out_kernel"]
    return {"params": params}
