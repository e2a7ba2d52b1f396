"""What tells one decoder from another."""

import hashlib
import json
from typing import Any

import numpy as np

from vqvae_jax.config import Config
from vqvae_jax.models.vqvae import decoding_variables

DECODING_SETTINGS = (
    *("image_size", "downsampling", "hidden_channels", "residual_blocks", "residual", "attention"),
    *("embedding_dim", "num_embeddings", "code_dim", "reference_flatten", "precision"),
)
"""Fields of ModelConfig that decoding depends on."""


def fingerprint(config: Config, variables: Any) -> str:
    """SHA-256 in hexadecimal of what decoding depends on: the decoder, the codebook, and the settings of both."""
    settings = {name: getattr(config.model, name) for name in DECODING_SETTINGS}
    settings |= {"fit": config.data.fit}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, leaf in sorted(decoding_variables(variables).items()):
        digest.update(f"{path} {leaf.shape}".encode())
        digest.update(np.asarray(leaf, "<f4").tobytes())
    return digest.hexdigest()
