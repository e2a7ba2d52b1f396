"""The JAX side: a training step that is ready to be called, its FLOPs, and VGG16's weights for the PyTorch side."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.config import Config
from vqvae_jax.models import layers, vgg16, vgg_weights
from vqvae_jax.runtime import compilation
from vqvae_jax.training.state import create_train_state
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
        self._step = compilation.ahead(self._step, self._arguments(), compilation.GRADIENT)
        return self._step

    def flops(self) -> float:
        """XLA's count on one device, of a step in which nothing is looped over or computed twice."""
        kept = dataclasses.replace(self._config, training=dataclasses.replace(self._config.training, remat="none"))
        with mock.patch.object(layers, "attend", plain_attention):  # XLA counts a loop's body once
            lowered = make_train_step(kept).lower(*self._arguments())
        return lowered.cost_analysis()["flops"]

    def _arguments(self) -> tuple:
        return self.state, self._images, self._vgg_variables


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
