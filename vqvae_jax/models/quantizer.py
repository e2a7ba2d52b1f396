"""The vector quantizer: each position's vector is replaced by the nearest code of a learned codebook."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vqvae_jax.models.estimators import SHORTEST, straight_through

CHOICE = "choice"
"""Name, for ``jax.checkpoint``, of the indices of the chosen codes."""
CODEBOOK = "codebook"
"""Name of the collection of what the EMA quantizer keeps, and of its random stream."""
KMEANS_STEPS = 10
"""Lloyd iterations on the first batch; the codebook hardly moves after ten."""
FEWEST = 1e-6
"""Averages of counts below this are too small to divide by: the code stays where it is."""


@flax.struct.dataclass
class QuantizerOutput:
    """What the quantizer returns for latents [..., D].

    Attributes:
      quantized: [..., D], the chosen codes; gradients pass through them to the latents.
      indices: int32 [...], which code was chosen.
      loss: what to add to the training loss.
      codebook_loss: mean squared distance, moving the codes towards the latents.
      commitment_loss: the same distance, moving the latents towards the codes.
      entropy_loss: see ``entropy_loss``; 0 where it has no weight.
      counts: float32 [K], how often each code was chosen.

    Of several levels, ``indices`` is a tuple, the finest first, ``counts`` [levels, K], and losses are sums over them.
    """

    quantized: jax.Array
    indices: jax.Array
    loss: jax.Array
    codebook_loss: jax.Array
    commitment_loss: jax.Array
    entropy_loss: jax.Array
    counts: jax.Array


def nearest(latents: jax.Array, codes: jax.Array) -> jax.Array:
    """Indices int32 [...] of the codes [K, D] nearest to float32 latents [..., D]; the lowest of equals."""
    flat = jax.lax.stop_gradient(latents).reshape(-1, codes.shape[-1])
    indices = jnp.argmin(_distances(flat, codes), axis=1).astype(jnp.int32).reshape(latents.shape[:-1])
    return checkpoint_name(indices, CHOICE)


def _distances(flat: jax.Array, codes: jax.Array) -> jax.Array:
    """|z - e|^2 [N, K] of latents [N, D] and codes [K, D], without |z|^2, which is the same for every code."""
    products = jnp.matmul(flat, codes.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(jnp.square(codes), axis=1) - 2 * products


def entropy_loss(latents: jax.Array, codes: jax.Array, temperature: float, axis_name: str | None = None) -> jax.Array:
    """mean H(p) - H(mean p), with p = softmax(-|z - e|^2 / temperature) over the codes (Yu et al. 2023).

    arXiv:2310.05737. Falls as each float32 latent [..., D] becomes sure of its code [K, D] and as all codes are
    used alike; between -log K and 0. The mean p is that of all devices along ``axis_name``.
    """
    if not latents.size:
        return jnp.float32(0)
    flat = latents.reshape(-1, codes.shape[-1])
    log_p = jax.nn.log_softmax(-_distances(flat, codes) / temperature)
    p = jnp.exp(log_p)
    mean_p = jnp.mean(p, axis=0)
    if axis_name is not None:
        mean_p = jax.lax.pmean(mean_p, axis_name)
    # The floor keeps the gradient of a code that nothing chooses finite.
    log_mean_p = jnp.log(jnp.maximum(mean_p, jnp.finfo(jnp.float32).tiny))
    return jnp.sum(mean_p * log_mean_p) - jnp.mean(jnp.sum(p * log_p, axis=1))


def normalized(vectors: jax.Array) -> jax.Array:
    """Vectors [..., D] brought to length 1; those all but zero to less, with a finite gradient."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, SHORTEST**2))


def code_counts(indices: jax.Array, num_embeddings: int) -> jax.Array:
    """How often each code occurs in ``indices``: float32 [K]."""
    return jnp.zeros(num_embeddings, jnp.float32).at[indices.reshape(-1)].add(1)


def _squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(a - b)) if a.size else jnp.float32(0)


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a straight-through gradient (van den Oord et al. 2017, arXiv:1711.00937).

    For latents z and the nearest code e: quantized = z + sg(e - z) and
    loss = mean((sg(z) - e)^2) + commitment_cost * mean((z - sg(e))^2) + entropy_weight * entropy_loss(z),
    with sg the stop-gradient. With ``cosine``, z and e are brought to length 1 before anything else (Yu et al.
    2021, arXiv:2110.04627): the nearest is then the code at the smallest angle.
    Distances, the choice and the losses are float32 whatever the type of the latents.

    Attributes:
      num_embeddings: number K of codes.
      embedding_dim: width D of a code.
      commitment_cost: weight of the commitment loss.
      cosine: compare directions, and pass on codes of length 1.
      entropy_weight: weight of the entropy loss; 0 leaves it out.
      entropy_temperature: its temperature, in units of squared distance.
      estimator: passes the gradient of the codes on to the latents: a function of ``estimators``.
      axis_name: the pmapped axis whose devices share one codebook; None on one device.

    A [2, 8, 8, 64] array with K = 512, D = 64 becomes indices [2, 8, 8] and counts [512] that sum to 128.

    Raises:
      ValueError: the latents' last axis is not D.
    """

    num_embeddings: int
    embedding_dim: int
    commitment_cost: float = 0.25
    cosine: bool = False
    entropy_weight: float = 0.0
    entropy_temperature: float = 1.0
    estimator: Callable[[jax.Array, jax.Array], jax.Array] = straight_through
    axis_name: str | None = None

    def setup(self):
        self.embedding = self.param("embedding", self._initial, (self.num_embeddings, self.embedding_dim))

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        del train  # the codes are moved by their gradient
        z = self._prepared(latents)
        indices = nearest(z, self._codes())
        codes = self.lookup(indices)
        codebook_loss = _squared_distance(jax.lax.stop_gradient(z), codes)
        return self._output(latents, z, codes, indices, codebook_loss)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes float32 [..., D] of indices [...]."""
        return jnp.take(self._codes(), indices, axis=0)

    def _codes(self) -> jax.Array:
        return self._scaled(self.embedding)

    def _scaled(self, vectors: jax.Array) -> jax.Array:
        return normalized(vectors) if self.cosine else vectors

    def _initial(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if self.cosine:
            # The gradient of a direction is inverse to the length: codes near 0 would drown all others' gradients.
            return normalized(jax.random.normal(key, shape))
        bound = 1 / self.num_embeddings
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    def _prepared(self, latents: jax.Array) -> jax.Array:
        if latents.shape[-1] != self.embedding_dim:
            raise ValueError(f"latents {latents.shape} must end in the code width, {self.embedding_dim}")
        return self._scaled(latents.astype(jnp.float32))

    def _output(
        self, latents: jax.Array, z: jax.Array, codes: jax.Array, indices: jax.Array, codebook_loss: jax.Array
    ) -> QuantizerOutput:
        commitment_loss = _squared_distance(z, jax.lax.stop_gradient(codes))
        loss = codebook_loss + self.commitment_cost * commitment_loss
        entropy = jnp.float32(0)
        if self.entropy_weight:
            entropy = entropy_loss(z, self._codes(), self.entropy_temperature, self.axis_name)
            loss += self.entropy_weight * entropy
        return QuantizerOutput(
            quantized=self.estimator(z, codes).astype(latents.dtype),
            indices=indices,
            loss=loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            entropy_loss=entropy,
            counts=code_counts(indices, self.num_embeddings),
        )


class EMAVectorQuantizer(VectorQuantizer):
    """A quantizer whose codes are moving averages of the latents that chose them (ibid., appendix A.1).

    With n_i the latents that chose code i and S_i their sum: N_i <- d N_i + (1 - d) n_i,
    m_i <- d m_i + (1 - d) S_i, e_i = m_i / N_i. With ``kmeans`` the first training batch sets the codes. A code
    whose N_i falls below a share of the average is dead, and takes a random latent of the batch (Jukebox,
    arXiv:2005.00341, does so below 1 use). With ``cosine``, e_i is brought back to length 1 each time. The loss has
    no codebook term. Codes, averages and, with ``kmeans``, the flag of the first batch are in the collection
    ``codebook``, changed only with ``train``; a random stream of that name chooses the latents.

    Attributes:
      decay: d.
      kmeans: start by k-means on the first batch's latents, not from random codes.
      revive_below: the share of the average N below which a code is dead; 0 revives none.
    """

    decay: float = 0.97
    kmeans: bool = True
    revive_below: float = 0.03

    def setup(self):
        shape = (self.num_embeddings, self.embedding_dim)
        start = self.variable(CODEBOOK, "embedding", lambda: self._initial(self.make_rng("params"), shape))
        self.embedding = start
        self.counts = self.variable(CODEBOOK, "counts", lambda: jnp.ones(self.num_embeddings))
        self.sums = self.variable(CODEBOOK, "sums", lambda: start.value)
        if self.kmeans:
            self.started = self.variable(CODEBOOK, "started", lambda: jnp.zeros((), bool))

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        z = self._prepared(latents)
        update = train and not self.is_initializing()
        if update and self.kmeans:
            self._start(z)
        indices = nearest(z, self._codes())
        output = self._output(latents, z, self.lookup(indices), indices, jnp.float32(0))
        if update:
            self._update(z, indices, output.counts)
        return output

    def _codes(self) -> jax.Array:
        return self.embedding.value

    def _start(self, z: jax.Array) -> None:
        """Sets the codes from the first batch: K of its latents, then k-means."""

        def kmeans(flat: jax.Array) -> jax.Array:
            codes = self._random_latents(flat)
            for _ in range(KMEANS_STEPS):
                counts, sums = self._statistics(flat, nearest(flat, codes))
                means = self._scaled(sums / jnp.maximum(counts, 1)[:, None])
                codes = jnp.where(counts[:, None] > 0, means, codes)
            return codes

        flat = jax.lax.stop_gradient(z).reshape(-1, self.embedding_dim)
        codes = jax.lax.cond(self.started.value, lambda _: self._codes(), kmeans, flat)
        self.embedding.value = codes
        self.sums.value = jnp.where(self.started.value, self.sums.value, codes * self.counts.value[:, None])
        self.started.value = jnp.ones((), bool)

    def _update(self, z: jax.Array, indices: jax.Array, counts: jax.Array) -> None:
        flat = jax.lax.stop_gradient(z).reshape(-1, self.embedding_dim)
        counts, sums = self._statistics(flat, indices.reshape(-1))
        counts = self.decay * self.counts.value + (1 - self.decay) * counts
        sums = self.decay * self.sums.value + (1 - self.decay) * sums
        average = jnp.mean(counts)
        dead = counts < self.revive_below * average
        counts = jnp.where(dead, average, counts)
        sums = jnp.where(dead[:, None], average * self._random_latents(flat), sums)
        means = self._scaled(sums / jnp.maximum(counts, FEWEST)[:, None])
        self.embedding.value = jnp.where(counts[:, None] > FEWEST, means, self._codes())
        self.counts.value, self.sums.value = counts, sums

    def _statistics(self, flat: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Number [K] and sum [K, D] of the latents that chose each code, over all devices."""
        counts = code_counts(indices, self.num_embeddings)
        sums = jnp.zeros((self.num_embeddings, self.embedding_dim)).at[indices].add(flat)
        return self._over_devices(jax.lax.psum, (counts, sums))

    def _random_latents(self, flat: jax.Array) -> jax.Array:
        """K latents [K, D] drawn from every device's; the same on all of them."""
        chosen = jax.random.randint(self.make_rng(CODEBOOK), (self.num_embeddings,), 0, flat.shape[0])
        drawn = flat[chosen]
        everywhere = self._over_devices(jax.lax.all_gather, drawn[None])
        everywhere = everywhere.reshape(-1, *drawn.shape)
        return everywhere[jnp.arange(self.num_embeddings) % len(everywhere), jnp.arange(self.num_embeddings)]

    def _over_devices(self, collective: Any, values: Any) -> Any:
        return values if self.axis_name is None else collective(values, self.axis_name)
