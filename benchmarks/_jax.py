"""The JAX side: what is ready to be called and measured, FLOPs, and VGG16's weights for the PyTorch side."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.config import Config, PriorConfig
from vqvae_jax.inference import samples
from vqvae_jax.models import layers, prior_integers, vgg16, vgg_weights
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime import compilation
from vqvae_jax.training import prior_step
from vqvae_jax.training.state import create_train_state, init_variables
from vqvae_jax.training.step import StepMetrics, make_train_step, replicate, split_over_devices

VGG_LAYER = "relu3_3"


def plain_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """``layers.attend`` with all scores at once."""
    scores = jnp.einsum("nqc,nkc->nqk", query, key, preferred_element_type=jnp.float32)
    return jnp.einsum("nqk,nkv->nqv", jax.nn.softmax(scores).astype(value.dtype), value)


class TrainingStep:
    """A configuration's training step, with a fresh state, a batch of noise and random VGG16 weights.

    A call takes one step and returns its metrics.
    """

    def __init__(self, config: Config):
        self._config = config
        vgg = vgg_weights.load(vgg_weights.RANDOM, *config.loss.perceptual_layers)
        self._vgg_variables = replicate(vgg) if config.loss.perceptual_weight else None
        self.state = replicate(create_train_state(config, 1000))
        shape = (config.training.batch_size, *config.model.image_size, 1)
        self._images = jnp.asarray(split_over_devices(np.random.default_rng(0).random(shape, np.float32)))
        self._step = make_train_step(config)

    def __call__(self) -> StepMetrics:
        self.state, metrics = self._step(*self._arguments())
        return metrics

    def compile(self) -> jax.stages.Compiled:
        """Compiles the step ahead; returns the program that calls run from now on."""
        self._step = compilation.ahead(self._step, self._arguments())
        return self._step

    def flops(self) -> float:
        """XLA's count on one device, of a step in which nothing is looped over or computed twice."""
        kept = dataclasses.replace(self._config, training=dataclasses.replace(self._config.training, remat="none"))
        with mock.patch.object(layers, "attend", plain_attention):  # XLA counts a loop's body once
            lowered = make_train_step(kept).lower(*self._arguments())
        return lowered.cost_analysis()["flops"]

    def _arguments(self) -> tuple:
        return self.state, self._images, self._vgg_variables


class Inference:
    """The compiled half of a fresh model: ``encode`` images of noise, or ``decode`` codes by chance."""

    def __init__(self, config: Config, what: str):
        model, rng, count = config.model, np.random.default_rng(0), config.training.batch_size
        variables = jax.jit(functools.partial(init_variables, model))(jax.random.key(0))
        images = rng.random((count, *model.image_size, 1), np.float32)
        codes = rng.integers(0, model.num_embeddings, (count, *model.latent_size), np.int32)
        method, given = ("to_indices", images) if what == "encode" else ("from_indices", codes)
        self._call = compilation.jit(functools.partial(VQVAE(model).apply, method=method))
        self._arguments = variables, jnp.asarray(given)

    def __call__(self) -> jax.Array:
        return self._call(*self._arguments)

    def compile(self) -> jax.stages.Compiled:
        """As ``TrainingStep.compile``."""
        self._call = compilation.ahead(self._call, self._arguments)
        return self._call


class PriorStep:
    """The training step of a prior over a configuration's codes, with a fresh state and codes by chance.

    A call takes one step and returns its loss.
    """

    def __init__(self, config: Config, prior: PriorConfig):
        model = config.model
        codebook = jax.random.normal(jax.random.key(0), (model.num_embeddings, model.codebook_dim))
        self._state = replicate(prior_step.create_prior_state(prior, model, codebook, 1000))
        rng, count = np.random.default_rng(0), prior.batch_size
        codes = rng.integers(
            model.num_embeddings, size=(count, 1 + prior.neighbours, *model.latent_size), dtype=np.int32
        )
        grids = prior_step.Grids(codes[:, 0], codes[:, 1:], np.ones((count, prior.neighbours), bool))
        self._grids = jax.tree.map(split_over_devices, grids)
        self._step = prior_step.make_prior_train_step(prior, model)

    def __call__(self) -> jax.Array:
        self._state, loss = self._step(self._state, self._grids)
        return loss

    def compile(self) -> jax.stages.Compiled:
        """As ``TrainingStep.compile``."""
        self._step = compilation.ahead(self._step, (self._state, self._grids))
        return self._step


class Sampling:
    """Draws slices' codes from a prior over a configuration's codes that nobody trained. A call returns them."""

    def __init__(self, config: Config, prior: PriorConfig, count: int):
        made = prior_step.make_prior(prior, config.model)
        self._program = prior_integers.PriorProgram(prior_integers.to_integers(made, made.fresh(jax.random.key(0))))
        self._codes = np.zeros((count, *config.model.latent_size), np.int32)
        self._before = np.zeros((count, prior.neighbours, *config.model.latent_size), np.int32)

    def __call__(self) -> np.ndarray:
        known, present = self._codes > 0, np.zeros(self._before.shape[:2], bool)
        options = {"rng": np.random.default_rng(0)}
        return samples.draw_codes(self._program, self._codes, known, self._before, present, **options)


def vgg_arrays(weights: str, layer: str = VGG_LAYER) -> dict[str, np.ndarray]:
    """VGG16 down to ``layer`` by torchvision's names, as ``_torch.Features`` takes it.

    Beside them are ``mean`` and ``std`` [3], by which these weights expect their input to be normalised.
    """
    variables = vgg_weights.load(weights, layer)
    arrays = {name: np.array(values) for name, values in variables[vgg16.INPUT].items()}
    for conv in vgg16.up_to(layer).values():
        params = variables["params"][conv.name]
        arrays[f"features.{conv.torchvision}.weight"] = np.array(params["kernel"]).transpose(3, 2, 0, 1).copy()  # OIHW
        arrays[f"features.{conv.torchvision}.bias"] = np.array(params["bias"])
    return arrays
