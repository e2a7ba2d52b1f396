"""Choosing the codes of images for few bits as well as little error: rate-distortion optimisation in the encoder.

A code need not be the nearest: one a little further off may take far fewer bits. Here codes minimise
J = distortion + weight * bits a pixel, as entropy-constrained vector quantization does (Chou, Lookabaugh and Gray 1989,
doi:10.1109/29.17498). Decoder and file format know nothing of it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.config import PRESETS, Config
from vqvae_jax.metrics.similarity import SSIM_WINDOW, ssim
from vqvae_jax.models import rounding
from vqvae_jax.models.prior import coding_order
from vqvae_jax.models.prior_integers import PriorProgram
from vqvae_jax.models.quantizer import squared_distances
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime import compilation
from vqvae_jax.training.losses import RECONSTRUCTION
from vqvae_jax.training.prior_step import codebook_of

DESCENTS = (0, 0, 6, 24)
"""At each effort, how often every code is chosen by the decoder's error. Effort 0 takes the nearest codes."""
WEIGHT = 0.1
"""Of bits a pixel, where the model was trained without a rate weight: the one that docs/results.md measures."""
FLATTER, STEEPER = 0.7, 2.0
"""Factors on the curvature that is assumed, after a change that was taken and one that was not. Without the first, more
descents changed nothing on the one volume that was tried."""
_LATTICE = 2
"""Stride of the lattices whose codes are chosen at once: these are no neighbours."""


class Chooser:
    """Chooses codes for slices under a prior, as a model's own training weighs distortion.

    Args:
      config: the run's configuration.
      variables: its model's.
      program: the prior over its codes.
      weight: of bits a pixel; by default that of training, or WEIGHT.
    """

    def __init__(self, config: Config, variables: Any, program: PriorProgram, weight: float | None = None):
        model = VQVAE(config.model)
        self._program = program
        self._variables = variables
        self._codebook = codebook_of(variables)
        self._weight = weight or config.loss.rate_weight or WEIGHT

        def error(codes: jax.Array, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            each = _distortion(config, model.apply(variables, codes, method="from_codes"), images)
            return jnp.sum(each), each

        def descend(variables: Any, indices: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Errors [N] of codes [N, h, w], and their gradient [N, h, w, d] by the codes' vectors."""
            codes = jnp.take(codebook_of(variables), indices, axis=0)
            gradient, each = jax.grad(error, has_aux=True)(codes, variables, images)
            return each, gradient

        self._latents = compilation.jit(functools.partial(model.apply, method="to_latents"))
        self._distances = compilation.jit(squared_distances)
        self._descend = compilation.jit(descend)

    def choose(self, image: np.ndarray, before: list[np.ndarray], effort: int) -> np.ndarray:
        """Codes int32 [h, w] of a slice float32 [H, W, 1] in [0, 1] on the model's grid.

        Args:
          image: the slice.
          before: codes of the slices before it that its own are coded given, the nearest first.
          effort: 1 to 3. 1 goes once through the coding order, by squared distance. 2 and 3 go on by the decoder's
            own error.
        """
        image = image[None]
        distances = np.asarray(self._distances(self._latents(self._variables, image), self._codebook))[0]
        work = _Slice(self._program, before, distances.shape[:2], self._weight / image.size)
        error = functools.partial(self._error, image=image)
        grid = distances.argmin(axis=2).astype(np.int32)
        scale = _error_a_distance(error, distances, grid)
        distances = distances * scale
        order = coding_order(*grid.shape)
        for number in np.unique(order):
            work.take_cheapest(grid, order == number, distances, order < number)
        return self._descended(grid, error, work, scale, DESCENTS[effort]) if DESCENTS[effort] else grid

    def _descended(self, grid: np.ndarray, error: Any, work: "_Slice", curvature: float, times: int) -> np.ndarray:
        """Codes chosen by the decoder's error, to second order about the codes so far.

        With g the gradient of the error by the vector of a code, c the curvature and v the way to another code, the
        other is taken to change the error by g v + c |v|^2, and the bits as given all other codes. All of a lattice
        change at once. Where that makes J worse, they stay, and the curvature is taken to be greater.
        """
        codebook = np.asarray(self._codebook)
        now, gradient = error(grid)
        for chosen in _lattices(grid.shape) * times:
            own = grid[chosen]
            away = codebook[None] - codebook[own][:, None]
            change = np.einsum("nkd,nd->nk", away, gradient[chosen]) + curvature * np.sum(away**2, axis=2)
            costs = work.costs(grid, chosen, ~chosen)
            new = np.argmin(change + costs, axis=1)
            tried = grid.copy()
            tried[chosen] = new
            rows = np.arange(len(own))
            found, steeper = error(tried)
            if found - now + np.sum(costs[rows, new] - costs[rows, own]) < 0:
                grid, now, gradient = tried, found, steeper
                curvature *= FLATTER
            else:
                curvature *= STEEPER
        return grid

    def _error(self, grid: np.ndarray, image: np.ndarray) -> tuple[float, np.ndarray]:
        """Distortion of the image that codes [h, w] are decoded to, and its gradient [h, w, d] by their vectors."""
        each, gradient = self._descend(self._variables, grid[None], image)
        return float(each[0]), np.asarray(gradient)[0]


class _Slice:
    """A slice's bits by the prior; ``price`` is the weight of one of them."""

    def __init__(self, program: PriorProgram, before: list[np.ndarray], shape: tuple[int, int], price: float):
        neighbours = program.prior.neighbours
        grids = np.zeros((1, neighbours, *shape), np.int32)
        for number, given in enumerate(before[:neighbours]):
            grids[0, number] = given
        self._program = program
        self._context = program.context(grids, np.arange(neighbours)[None] < len(before))
        self._price = price

    def costs(self, grid: np.ndarray, chosen: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Price of each code's bits at the chosen places, float64 [n, K], given the known codes."""
        logits = self._program.logits(grid[None], known[None], self._context)[0][chosen]
        nats = logits / 2.0**rounding.LOGIT_BITS
        nats = np.log(np.exp(nats - nats.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - (
            nats - nats.max(axis=1, keepdims=True)
        )
        return self._price / math.log(2) * nats

    def take_cheapest(self, grid: np.ndarray, chosen: np.ndarray, errors: np.ndarray, known: np.ndarray) -> None:
        """Replaces the chosen codes of a grid with those of least error and price."""
        grid[chosen] = np.argmin(errors[chosen] + self.costs(grid, chosen, known), axis=1)


def _error_a_distance(error: Any, distances: np.ndarray, grid: np.ndarray) -> float:
    """How much a unit of squared distance to the code adds to an image's error: by the second nearest codes.

    Where these make it no worse, all of the image's error is put down to the distances.
    """
    chosen = _lattices(grid.shape)[0]
    second = grid.copy()
    second[chosen] = np.argpartition(distances[chosen], 1, axis=1)[:, 1]
    least, next_least = (np.take_along_axis(distances, each[..., None], axis=2).sum() for each in (grid, second))
    own = error(grid)[0]
    more = error(second)[0] - own
    return more / max(next_least - least, 1e-12) if more > 0 else own / max(least, 1e-12)


def _lattices(shape: tuple[int, int]) -> list[np.ndarray]:
    """Masks [h, w] of the places of a grid, in parts without neighbours."""
    rows, columns = np.indices(shape) % _LATTICE
    return [(rows == row) & (columns == column) for row in range(_LATTICE) for column in range(_LATTICE)]


def _distortion(config: Config, reconstruction: jax.Array, images: jax.Array) -> jax.Array:
    """That of the model's training, but for its perceptual term: float32 [N].

    Of ``hipmri`` where a training without a rate weight had L1 and the perceptual term alone.
    """
    loss = config.loss
    if not loss.rate_weight and not loss.ssim_weight and loss.reconstruction == "l1":
        loss = PRESETS["hipmri"].loss
    pixels = jax.vmap(RECONSTRUCTION[loss.reconstruction])(reconstruction, images)
    if not loss.ssim_weight or min(images.shape[1:3]) < SSIM_WINDOW:
        return pixels
    return pixels + loss.ssim_weight * (1 - ssim(reconstruction, images))
