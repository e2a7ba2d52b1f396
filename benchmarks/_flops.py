"""How many FLOPs a training step has: XLA's count, of a step in which nothing is looped over or computed twice."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from vqvae_jax import training
from vqvae_jax.config import Config
from vqvae_jax.models import layers


def plain_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """``layers.attend`` with all scores at once."""
    scores = jnp.einsum("nqc,nkc->nqk", query, key, preferred_element_type=jnp.float32)
    return jnp.einsum("nqk,nkv->nqv", jax.nn.softmax(scores).astype(value.dtype), value)


def step_flops(config: Config, state: Any, images: jax.Array, vgg_params: Any) -> float:
    """FLOPs of one training step on images [devices, B, H, W, 1], on one device; XLA counts a loop's body once."""
    kept = dataclasses.replace(config, training=dataclasses.replace(config.training, remat="none"))
    with mock.patch.object(layers, "attend", plain_attention):
        lowered = training.make_train_step(kept).lower(state, images, vgg_params)
    return lowered.cost_analysis()["flops"]
