"""A vector-quantized variational autoencoder for MRI slices, in JAX and Flax."""

import importlib
from typing import Any

try:
    import fcntl as _fcntl  # noqa: F401  (locks of run folders and of built data sets)
except ImportError:
    raise ImportError("vqvae_jax runs on Linux and macOS, and on Windows within WSL; this system is neither") from None

_PUBLIC = {
    "Config": "vqvae_jax.config",
    "PRESETS": "vqvae_jax.config",
    "VQVAE": "vqvae_jax.models.vqvae",
    "VQVAEError": "vqvae_jax.errors",
    "evaluate_run": "vqvae_jax.evaluation.evaluate",
    "load": "vqvae_jax.inference.trained_model",
    "train_and_evaluate": "vqvae_jax.trainer",
}

__all__ = ["PRESETS", "VQVAE", "Config", "VQVAEError", "evaluate_run", "load", "train_and_evaluate"]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that the model can be had without the data libraries.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
