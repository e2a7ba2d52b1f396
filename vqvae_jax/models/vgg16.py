"""VGG16's convolutional features in Flax, and where its weights come from."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.errors import ConfigError, WeightsError

# Output channels of each 3 x 3 convolution; a 2 x 2 max pool stands between blocks. Configuration D of
# K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015.
RANDOM = "random"
"""Stands for untrained weights where a file is expected."""

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# Statistics of ImageNet in RGB on [0, 1], by which torchvision's weights expect their input to be normalised.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_ADVICE = "take a file of VGG16 (not VGG16-BN) under torchvision's names"


class Convolution(NamedTuple):
    """One convolution, with the ReLU after it."""

    name: str
    pool: bool  # whether a max pool stands before it
    in_channels: int
    out_channels: int
    torchvision: int  # N of features.N


def _layers() -> dict[str, Convolution]:
    layers: dict[str, Convolution] = {}
    in_channels, index = 3, 0
    for block, widths in enumerate(BLOCKS, 1):
        for i, width in enumerate(widths, 1):
            pool = block > 1 and i == 1
            layers[f"relu{block}_{i}"] = Convolution(f"conv{block}_{i}", pool, in_channels, width, index)
            in_channels = width
            index += 2  # the convolution and its ReLU
        index += 1  # the pool
    return layers


# relu1_1 to relu5_3, in the order they are computed.
LAYERS = _layers()


class VGG16(nn.Module):
    """Features of images after chosen ReLUs, computed no deeper than the deepest of them.

    Attributes:
      layers: names from `LAYERS`.
      dtype: of the computation and of the features; parameters are float32.
    """

    layers: tuple[str, ...] = ("relu3_3",)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Images [N, H, W, 1] (grey) or [N, H, W, 3] (RGB) in [0, 1] to the features of each layer.

        Returns:
          Layer name -> [N, H // 2^p, W // 2^p, C], p the number of pools before the layer: relu3_3 of
          [N, 256, 128, 1] is [N, 64, 32, 256].

        Raises:
          ConfigError: a layer is unknown, or the images are too small to be pooled so often.
          ValueError: the images have another shape.
        """
        needed = _up_to(*self.layers)
        _check_images(images, pools=sum(conv.pool for conv in needed.values()))
        x = normalise(images)
        features = {}
        for layer, conv in needed.items():
            if conv.pool:
                x = max_pool(x)
            x = nn.Conv(conv.out_channels, (3, 3), padding=1, dtype=self.dtype, name=conv.name)(x)
            x = nn.relu(x)
            if layer in self.layers:
                features[layer] = x
        return features


def normalise(images: jax.Array) -> jax.Array:
    """torchvision's input convention: [..., 1] or [..., 3] in [0, 1] to standardised RGB [..., 3].

    One channel broadcasts against the three statistics, which is grey repeated to RGB.
    """
    images = jnp.asarray(images, jnp.float32)
    return (images - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)


def max_pool(x: jax.Array) -> jax.Array:
    """2 x 2 max pool, [N, H, W, C] -> [N, H // 2, W // 2, C]; as PyTorch, drops an odd last row or column.

    A reshape and a max, since the gradient of `nn.max_pool` takes seven times as long on a CPU. Equal maxima
    share the gradient, where PyTorch gives all to the first; after a ReLU, ties at 0 pass none either way.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def params_for(weights: str, layer: str) -> dict:
    """Parameters for `VGG16` up to `layer`: `random_params` for RANDOM, else `load_params` of that path."""
    return random_params(layer) if weights == RANDOM else load_params(weights, layer)


def random_params(layer: str, *, seed: int = 0) -> dict:
    """He-initialised parameters up to `layer`: kernels normal with variance 2 / fan_in, biases zero.

    fan_in (torchvision takes fan_out) is what keeps the activations' mean square through a ReLU, so deep
    features are no smaller than shallow ones (He et al., "Delving deep into rectifiers", 2015, equation 10).
    Each convolution has its own random stream, so its weights do not depend on `layer`.

    Returns {"conv1_1": {"kernel": [3, 3, in, out], "bias": [out]}, ...}; an unknown layer is a ConfigError.
    """
    params = {}
    for conv in _up_to(layer).values():
        rng = np.random.default_rng((seed, conv.torchvision))
        kernel = rng.standard_normal((3, 3, conv.in_channels, conv.out_channels), np.float32)
        kernel *= (2 / (9 * conv.in_channels)) ** 0.5
        params[conv.name] = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(conv.out_channels)}
    return params


def load_params(path: str | Path, layer: str) -> dict:
    """Parameters up to `layer`, as `random_params` gives them, from a safetensors file.

    It holds `features.N.weight` [out, in, 3, 3] and `features.N.bias` [out] in any floating type, which are
    torchvision's names; what the layer does not need is not read.

    Raises:
      ConfigError: the layer is unknown.
      WeightsError: the file is missing or not safetensors; a tensor is missing, misshapen or not finite.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only for those who load weights

    needed = _up_to(layer)
    if not Path(path).is_file():
        raise WeightsError(f"{path}: expected VGG16 weights as safetensors, found no file; mend the path")
    try:
        with safe_open(path, framework="flax") as file:
            _check_keys(path, set(file.keys()), needed)
            return {conv.name: _read_convolution(path, file, conv) for conv in needed.values()}
    except (SafetensorError, OSError) as error:
        advice = "convert the weights, or fetch the file again if it was cut short"
        raise WeightsError(f"{path}: expected safetensors, found a file with '{error}'; {advice}") from error


def _check_keys(path: str | Path, found: set[str], needed: dict[str, Convolution]) -> None:
    reached = "no layer"
    for layer, conv in needed.items():
        for key in (f"features.{conv.torchvision}.weight", f"features.{conv.torchvision}.bias"):
            if key not in found:
                advice = f"the file reaches {reached}; {_ADVICE}, or ask for a layer it reaches"
                raise WeightsError(f"{path}: expected {key} for {list(needed)[-1]}, found none; {advice}")
        reached = layer


def _read_convolution(path: str | Path, file: Any, conv: Convolution) -> dict:
    shape = (conv.out_channels, conv.in_channels, 3, 3)
    kernel = _read(path, file, f"features.{conv.torchvision}.weight", shape).transpose(2, 3, 1, 0)  # to HWIO
    return {"kernel": kernel, "bias": _read(path, file, f"features.{conv.torchvision}.bias", shape[:1])}


def _read(path: str | Path, file: Any, key: str, shape: tuple[int, ...]) -> jax.Array:
    values = file.get_tensor(key)
    if values.shape != shape or not jnp.issubdtype(values.dtype, jnp.floating):
        found = f"{values.dtype} of shape {values.shape}"
        raise WeightsError(f"{path}: expected {key} in floats of shape {shape}, found {found}; {_ADVICE}")
    values = values.astype(jnp.float32)
    if not jnp.isfinite(values).all():
        raise WeightsError(f"{path}: expected finite numbers in {key}, found NaN or infinity; {_ADVICE}")
    return values


def _up_to(*layers: str) -> dict[str, Convolution]:
    """The part of `LAYERS` that ends with the deepest of the given ones."""
    names = list(LAYERS)
    if not layers or not set(layers) <= set(names):
        raise ConfigError(f"VGG16 layers: expected some of {', '.join(names)}; found {layers or 'none'}")
    depth = max(map(names.index, layers))
    return {name: LAYERS[name] for name in names[: depth + 1]}


def _check_images(images: jax.Array, pools: int) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"VGG16 expects images [N, H, W, 1] or [N, H, W, 3], got {images.shape}")
    if min(images.shape[1:3]) < 2**pools:
        raise ConfigError(
            f"images of {images.shape[1]} x {images.shape[2]} vanish in VGG16's {pools} pools; "
            f"take at least {2**pools} x {2**pools} or a shallower layer"
        )
