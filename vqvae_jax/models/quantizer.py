"""The vector quantizer: each position's vector is replaced by the nearest code of a learned codebook."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vqvae_jax.models.layers import Dense

LATENTS_AT_ONCE, LATENTS_AT_ONCE_ON_CPU = 2**16, 2**9
"""Latents whose distances to all codes are in memory at once; on a CPU, in its caches."""
CHOICE = "choice"
"""Name, for ``jax.checkpoint``, of the indices of the chosen codes."""
EMA = "ema"
"""Name of the collection of what the EMA quantizer keeps, and of its random stream."""
COMMITMENT_COST = 0.25
"""Weight of the commitment loss: the paper's (van den Oord et al. 2017, section 3.2)."""
DECAY = 0.97
"""Share of the old averages kept at each step; 0.99 is worse (docs/results.md)."""
DEAD_BELOW = 0.03
"""A code with less than this share of the codes' average use is dead, and takes a random latent of the batch."""
KMEANS_STEPS = 10
"""Lloyd iterations on the first batch; the codebook hardly moves after ten."""


@flax.struct.dataclass
class QuantizerOutput:
    """What the quantizer returns for latents [..., D].

    Attributes:
      quantized: [..., D], the chosen codes; gradients pass through them to the latents.
      indices: int32 [...], which code was chosen.
      latents: float32 [..., d], what the codes were compared with.
      loss: what to add to the training loss.
      codebook_loss: mean squared distance, moving the codes towards the latents.
      commitment_loss: the same distance, moving the latents towards the codes.
      counts: float32 [K], how often each code was chosen.
    """

    quantized: jax.Array
    indices: jax.Array
    latents: jax.Array
    loss: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array
    counts: jax.Array


def nearest(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """Indices int32 [...] of the codes [K, D] nearest to float32 latents [..., D]; the lowest of equals."""
    flat = jax.lax.stop_gradient(latents).reshape(-1, codebook.shape[-1])

    # |z - e|^2 without |z|^2, which is the same for every code: a product of [-2 e, |e|^2] and [z, 1].
    codes = jnp.concatenate([-2 * codebook, jnp.sum(jnp.square(codebook), axis=1, keepdims=True)], axis=1)

    def choose(block: jax.Array) -> jax.Array:
        block = jnp.concatenate([block, jnp.ones((len(block), 1), block.dtype)], axis=1)
        distances = jnp.matmul(codes, block.T, precision=jax.lax.Precision.HIGHEST)  # [K, latents]
        # As argmin, which a CPU computes in one thread and one number at a time.
        least = jnp.min(distances, axis=0)
        numbers = jax.lax.broadcasted_iota(jnp.int32, distances.shape, 0)
        return jnp.min(jnp.where(distances <= least, numbers, len(codebook) - 1), axis=0)

    at_once = LATENTS_AT_ONCE_ON_CPU if jax.default_backend() == "cpu" else LATENTS_AT_ONCE
    blocks = max(1, -(-len(flat) // at_once))
    padded = jnp.pad(flat, ((0, -len(flat) % blocks), (0, 0))).reshape(blocks, -1, flat.shape[1])
    indices = jax.lax.map(choose, padded).reshape(-1)[: len(flat)]
    return checkpoint_name(indices.reshape(latents.shape[:-1]), CHOICE)


def squared_distances(latents: jax.Array, codebook: jax.Array) -> jax.Array:
    """|z - e|^2 float32 [..., K] of latents [..., d] to all codes [K, d]."""
    products = jnp.matmul(latents, codebook.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(jnp.square(codebook), axis=1) - 2 * products
    return jnp.maximum(squares + jnp.sum(jnp.square(latents), axis=-1, keepdims=True), 0)


def straight_through(latents: jax.Array, codes: jax.Array) -> jax.Array:
    """Codes [..., D] in value, latents [..., D] in gradient: z + sg(q - z) (Bengio et al. 2013, arXiv:1308.3432)."""
    return latents + jax.lax.stop_gradient(codes - latents)


def code_counts(indices: jax.Array, num_embeddings: int) -> jax.Array:
    """How often each code occurs in ``indices``: float32 [K]."""
    return jnp.zeros(num_embeddings, jnp.float32).at[indices.reshape(-1)].add(1)


def _squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(a - b)) if a.size else jnp.float32(0)


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a straight-through gradient (van den Oord et al. 2017, arXiv:1711.00937).

    For latents z and the nearest code e: quantized = z + sg(e - z) and
    loss = mean((sg(z) - e)^2) + commitment_cost * mean((z - sg(e))^2), with sg the stop-gradient.
    Distances, the choice and the losses are float32 whatever the type of the latents.

    Attributes:
      num_embeddings: number K of codes.
      codebook_dim: width D of a code.
      commitment_cost: weight of the commitment loss.
      axis_name: the pmapped axis whose devices share one codebook; None on one device.

    A [2, 8, 8, 64] array with K = 512, D = 64 becomes indices [2, 8, 8] and counts [512] that sum to 128.

    Raises:
      ValueError: the latents' last axis is not D.
    """

    num_embeddings: int
    codebook_dim: int
    commitment_cost: float = COMMITMENT_COST
    axis_name: str | None = None

    def setup(self):
        self.codebook = self.param("codebook", self._initial, (self.num_embeddings, self.codebook_dim))

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        del train  # the codes are moved by their gradient
        z = self._checked(latents)
        indices = nearest(z, self.codebook)
        codes = self.lookup(indices)
        codebook_loss = _squared_distance(jax.lax.stop_gradient(z), codes)
        return self._output(latents, z, codes, indices, codebook_loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes float32 [..., D] of indices [...]."""
        return jnp.take(self.codebook, indices, axis=0)

    def widen(self, codes: jax.Array) -> jax.Array:
        """What a decoder takes, of codes [..., D]: themselves."""
        return codes

    def _initial(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        bound = 1 / self.num_embeddings
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    def _checked(self, latents: jax.Array) -> jax.Array:
        if latents.shape[-1] != self.codebook_dim:
            raise ValueError(f"latents {latents.shape} must end in the code width, {self.codebook_dim}")
        return latents.astype(jnp.float32)

    def _output(
        self, latents: jax.Array, z: jax.Array, codes: jax.Array, indices: jax.Array, codebook_loss: jax.Array
    ) -> QuantizerOutput:
        commitment_loss = _squared_distance(z, jax.lax.stop_gradient(codes))
        return QuantizerOutput(
            quantized=straight_through(z, codes).astype(latents.dtype),
            indices=indices,
            latents=z,
            loss=codebook_loss + self.commitment_cost * commitment_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            counts=code_counts(indices, self.num_embeddings),
        )


class EMAVectorQuantizer(VectorQuantizer):
    """A quantizer whose codes are moving averages of the latents that chose them (ibid., appendix A.1).

    With n_i the latents that chose code i, S_i their sum and d = DECAY: N_i <- d N_i + (1 - d) n_i,
    m_i <- d m_i + (1 - d) S_i, e_i = m_i / N_i. K-means on the first training batch sets the codes. A code whose N_i
    falls below DEAD_BELOW of the average is dead, and takes a random latent of the batch (Jukebox, arXiv:2005.00341,
    does so below 1 use). The loss has no codebook term. Codes, averages and the flag of the first batch are in the
    collection ``ema``, changed only with ``train``; a random stream of that name chooses the latents.
    """

    def setup(self):
        shape = (self.num_embeddings, self.codebook_dim)
        start = self.variable(EMA, "codebook", lambda: self._initial(self.make_rng("params"), shape))
        self.average = start
        self.counts = self.variable(EMA, "counts", lambda: jnp.ones(self.num_embeddings, jnp.float32))
        self.sums = self.variable(EMA, "sums", lambda: start.value)
        self.started = self.variable(EMA, "started", lambda: jnp.zeros((), bool))

    @property
    def codebook(self) -> jax.Array:
        """The codes [K, D]."""
        return self.average.value

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        z = self._checked(latents)
        update = train and not self.is_initializing()
        if update:
            self._start(z)
        indices = nearest(z, self.codebook)
        output = self._output(latents, z, self.lookup(indices), indices, jnp.float32(0))
        if update:
            self._update(z, indices)
        return output

    def _start(self, z: jax.Array) -> None:
        """Sets the codes from the first batch: K of its latents, then k-means."""

        def closer(_: jax.Array, codebook: jax.Array) -> jax.Array:
            counts, sums = self._statistics(flat, nearest(flat, codebook))
            return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], codebook)

        def kmeans(flat: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, KMEANS_STEPS, closer, self._random_latents(flat))

        flat = jax.lax.stop_gradient(z).reshape(-1, self.codebook_dim)
        codebook = jax.lax.cond(self.started.value, lambda _: self.codebook, kmeans, flat)
        self.average.value = codebook
        self.sums.value = jnp.where(self.started.value, self.sums.value, codebook * self.counts.value[:, None])
        self.started.value = jnp.ones((), bool)

    def _update(self, z: jax.Array, indices: jax.Array) -> None:
        flat = jax.lax.stop_gradient(z).reshape(-1, self.codebook_dim)
        counts, sums = self._statistics(flat, indices.reshape(-1))
        counts = DECAY * self.counts.value + (1 - DECAY) * counts
        sums = DECAY * self.sums.value + (1 - DECAY) * sums
        average = jnp.mean(counts)
        dead = counts < DEAD_BELOW * average
        counts = jnp.where(dead, average, counts)
        sums = jnp.where(dead[:, None], average * self._random_latents(flat), sums)
        self.average.value = sums / counts[:, None]
        self.counts.value, self.sums.value = counts, sums

    def _statistics(self, flat: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Number [K] and sum [K, D] of the latents that chose each code, over all devices."""
        counts = code_counts(indices, self.num_embeddings)
        sums = jnp.zeros((self.num_embeddings, self.codebook_dim), jnp.float32).at[indices].add(flat)
        return self._over_devices(jax.lax.psum, (counts, sums))

    def _random_latents(self, flat: jax.Array) -> jax.Array:
        """K latents [K, D] drawn from every device's; the same on all of them."""
        chosen = jax.random.randint(self.make_rng(EMA), (self.num_embeddings,), 0, flat.shape[0])
        drawn = flat[chosen]
        everywhere = self._over_devices(jax.lax.all_gather, drawn[None])
        everywhere = everywhere.reshape(-1, *drawn.shape)
        return everywhere[jnp.arange(self.num_embeddings) % len(everywhere), jnp.arange(self.num_embeddings)]

    def _over_devices(self, collective: Any, values: Any) -> Any:
        return values if self.axis_name is None else collective(values, self.axis_name)


class ProjectedQuantizer(nn.Module):
    """Latents of width D are projected to the quantizer's own width, and its codes back to D.

    Few dimensions keep more of the codes in use (Yu et al. 2021, arXiv:2110.04627). The
    projections compute in float32, since the choice of a code hangs on them.

    Attributes:
      quantizer: any module with the quantizers' interface, for vectors of width ``code_dim``.
      code_dim: that width.
      embedding_dim: the latents' width D.

    A [2, 8, 8, 64] array, with ``code_dim`` 8, is quantized as [2, 8, 8, 8] and comes back as [2, 8, 8, 64].

    Raises:
      ValueError: the latents' last axis is not D.
    """

    quantizer: nn.Module
    code_dim: int
    embedding_dim: int

    def setup(self):
        start = {"kernel_init": nn.initializers.lecun_normal(), "bias_init": nn.initializers.zeros}
        self.project_in = Dense(self.code_dim, precision=jax.lax.Precision.HIGHEST, **start)
        self.project_out = Dense(self.embedding_dim, precision=jax.lax.Precision.HIGHEST, **start)

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        """The quantizer's output, with ``quantized`` [..., D]."""
        if latents.shape[-1] != self.embedding_dim:
            raise ValueError(f"latents {latents.shape} must end in the width {self.embedding_dim}")
        output = self.quantizer(self.project_in(latents.astype(jnp.float32)), train=train)
        return output.replace(quantized=self.project_out(output.quantized).astype(latents.dtype))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Projected codes float32 [..., D] of indices [...]: what a decoder takes."""
        return self.widen(self.quantizer.lookup(indices))

    def widen(self, codes: jax.Array) -> jax.Array:
        """What a decoder takes, [..., D], of codes [..., code_dim]."""
        return self.project_out(codes)
