"""VGG16's convolutional features in Flax; `vgg_weights` reads trained weights for it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.errors import ConfigError

# Output channels of each 3 x 3 convolution; a 2 x 2 max pool stands between blocks. Configuration D of
# K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# Statistics of ImageNet in RGB on [0, 1], by which torchvision's weights expect their input to be normalised.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INPUT = "input"
"""Variable collection with the input convention of the weights: `mean` [3] and `std` [3] of RGB on [0, 1]."""

Variables = dict[str, Any]
"""{"params": {"conv1_1": {"kernel": [3, 3, in, out], "bias": [out]}, ...}, INPUT: {"mean": [3], "std": [3]}}."""


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

    The weights' own normalisation of the input is a variable beside them, so the two cannot be mixed up.

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
        needed = up_to(*self.layers)
        _check_images(images, smallest_side(*self.layers))
        mean = self.variable(INPUT, "mean", jnp.asarray, IMAGENET_MEAN).value
        std = self.variable(INPUT, "std", jnp.asarray, IMAGENET_STD).value
        x = normalise(images, mean, std)
        features = {}
        for layer, conv in needed.items():
            if conv.pool:
                x = max_pool(x)
            x = nn.Conv(conv.out_channels, (3, 3), padding=1, dtype=self.dtype, name=conv.name)(x)
            x = nn.relu(x)
            if layer in self.layers:
                features[layer] = x
        return features


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Images [..., 1] or [..., 3] in [0, 1] to RGB [..., 3] less `mean` [3], over `std` [3].

    One channel broadcasts against the three statistics, which is grey repeated to RGB.
    """
    return (jnp.asarray(images, jnp.float32) - mean) / std


def max_pool(x: jax.Array) -> jax.Array:
    """2 x 2 max pool, [N, H, W, C] -> [N, H // 2, W // 2, C]; as PyTorch, drops an odd last row or column.

    A reshape and a max, since the gradient of `nn.max_pool` takes seven times as long on a CPU. Equal maxima
    share the gradient, where PyTorch gives all to the first; after a ReLU, ties at 0 pass none either way.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def random_variables(layer: str, *, seed: int = 0) -> Variables:
    """He-initialised variables up to `layer`: kernels normal with variance 2 / fan_in, biases zero.

    fan_in (torchvision takes fan_out) is what keeps the activations' mean square through a ReLU, so deep
    features are no smaller than shallow ones (He et al., "Delving deep into rectifiers", 2015, equation 10).
    Each convolution has its own random stream, so its weights do not depend on `layer`.

    An unknown layer is a ConfigError.
    """
    params = {}
    for conv in up_to(layer).values():
        rng = np.random.default_rng((seed, conv.torchvision))
        kernel = rng.standard_normal((3, 3, conv.in_channels, conv.out_channels), np.float32)
        kernel *= (2 / (9 * conv.in_channels)) ** 0.5
        params[conv.name] = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(conv.out_channels)}
    return as_variables(params)


def as_variables(params: dict, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Variables:
    """Parameters together with the input convention they were trained under, as `VGG16` takes them.

    Args:
      params: {"conv1_1": {"kernel": [3, 3, in, out], "bias": [out]}, ...}, for RGB.
      mean, std: of RGB on [0, 1]; the default is torchvision's.
    """
    return {"params": params, INPUT: {"mean": jnp.asarray(mean), "std": jnp.asarray(std)}}


def up_to(*layers: str) -> dict[str, Convolution]:
    """The part of `LAYERS` that ends with the deepest of the given ones."""
    names = list(LAYERS)
    if not layers or not set(layers) <= set(names):
        raise ConfigError(f"VGG16 layers: expected some of {', '.join(names)}; found {layers or 'none'}")
    depth = max(map(names.index, layers))
    return {name: LAYERS[name] for name in names[: depth + 1]}


def smallest_side(*layers: str) -> int:
    """Pixels that images must have along each axis, so that something is left after the layers' pools."""
    return 2 ** sum(conv.pool for conv in up_to(*layers).values())


def _check_images(images: jax.Array, smallest: int) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"VGG16 expects images [N, H, W, 1] or [N, H, W, 3], got {images.shape}")
    if min(images.shape[1:3]) < smallest:
        raise ConfigError(
            f"images of {images.shape[1]} x {images.shape[2]} vanish in VGG16's {smallest.bit_length() - 1} pools; "
            f"take at least {smallest} x {smallest} or a shallower layer"
        )
