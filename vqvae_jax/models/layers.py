"""The blocks that encoder and decoder are made of.

Images are [N, H, W, C]. Convolutions compute in ``dtype``; parameters and norms are float32. Initial
kernels and biases follow PyTorch's defaults (uniform, +-1 / sqrt(fan_in)), as the published model does.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vqvae_jax.models.batch_norm import add_bias, batch_norm

LEAKY_SLOPE = 0.2
BATCH_NORM_MOMENTUM = 0.9
"""Share of the old running statistics kept at each step (PyTorch's momentum 0.1 says the same)."""
BATCH_NORM_EPSILON = 1e-5
EXPENSIVE, BLOCK = "expensive", "block"
"""Names, for ``jax.checkpoint``, of what is slow to compute again, and of what each block returns."""
QUERIES_AT_ONCE = 512
"""Queries in one block of attention: the fastest of 128 to 2048 on a CPU, within a few per cent."""

Dtype = Any

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1 / sqrt(fan_in): PyTorch's default for convolutions."""


def bias_init(fan_in: int) -> Callable:
    """Uniform in +-1 / sqrt(fan_in): PyTorch's default for biases."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def leaky_relu(x: jax.Array) -> jax.Array:
    """x where positive, else 0.2 x."""
    return nn.leaky_relu(x, LEAKY_SLOPE)


class Conv(nn.Module):
    """3 x 3 convolution, padded: [N, H, W, C] -> [N, H, W, features]; ``kernel`` is [3, 3, C, features]."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", bias_init(9 * x.shape[-1]), (self.features,), jnp.float32)
        out = _convolve(x.astype(self.dtype), kernel.astype(self.dtype), "SAME")
        return checkpoint_name(add_bias(out, bias), EXPENSIVE)


class Dense(nn.Module):
    """Linear map of the last axis: [..., C] -> [..., features]. ``kernel`` is [C, features]."""

    features: int
    dtype: Dtype = jnp.float32
    precision: jax.lax.Precision | None = None
    kernel_init: Callable = kernel_init
    bias_init: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (channels, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init or bias_init(channels), (self.features,), jnp.float32)
        return add_bias(_multiply(x.astype(self.dtype), kernel.astype(self.dtype), self.precision), bias)


class Norm(nn.Module):
    """Batch norm of [N, H, W, C] (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Over all images on all devices of ``axis_name`` (on this one where it is None), with running statistics in the
    collection ``batch_stats`` for when ``train`` is False.
    """

    axis_name: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        x = x.astype(self.dtype)
        if not train or self.is_initializing():
            factor = scale * jax.lax.rsqrt(running_var.value + BATCH_NORM_EPSILON)
            return ((x.astype(jnp.float32) - running_mean.value) * factor + bias).astype(self.dtype)
        x, mean, var = batch_norm(x, scale, bias, BATCH_NORM_EPSILON, self.axis_name)
        for running, new in ((running_mean, mean), (running_var, var)):
            running.value = BATCH_NORM_MOMENTUM * running.value + (1 - BATCH_NORM_MOMENTUM) * new
        return x


class Downsample(nn.Module):
    """4 x 4 convolution of stride 2, padding 1: [N, H, W, C] -> [N, H / 2, W / 2, features].

    ``kernel`` is [4, 4, C, features]. Computed as a 2 x 2 convolution of blocks of 2 x 2 pixels, or, of one channel, as
    a product with its 4 x 4 windows. On a CPU, XLA's own strided convolution has a gradient several times slower.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, height, width = x.shape[-1], x.shape[1] // 2, x.shape[2] // 2
        kernel = self.param("kernel", kernel_init, (4, 4, channels, self.features), jnp.float32)
        bias = self.param("bias", bias_init(16 * channels), (self.features,), jnp.float32)
        kernel = kernel.astype(self.dtype).reshape(2, 2, 2, 2, channels, self.features)  # row 2 a + s: [a, s, b, t]
        kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * channels, self.features)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))[:, : 2 * height + 2, : 2 * width + 2]
        x = x.reshape(len(x), height + 1, 2, width + 1, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(len(x), height + 1, width + 1, 4 * channels)
        if channels == 1:
            windows = [x[:, a : a + height, b : b + width] for a in (0, 1) for b in (0, 1)]
            out = _multiply(jnp.concatenate(windows, -1), kernel.reshape(16, self.features))
        else:
            out = _convolve(x, kernel)
        return checkpoint_name(add_bias(out, bias), EXPENSIVE)


class Upsample(nn.Module):
    """4 x 4 transposed convolution of stride 2, padding 1: [N, H, W, C] -> [N, 2 H, 2 W, features].

    The map of ``torch.nn.ConvTranspose2d(C, features, 4, 2, 1)``; ``kernel`` [4, 4, C, features] is its weight with
    the axes in this order. Computed as a sub-pixel convolution (Shi et al. 2016, arXiv:1609.05158): a 2 x 2
    convolution gives the four output pixels that see the same 2 x 2 input pixels. On a CPU, XLA's own transposed
    convolution has a gradient many times slower.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        fan_in = 16 * self.features  # PyTorch counts a transposed convolution's fan-in over its output channels
        kernel = self.param("kernel", bias_init(fan_in), (4, 4, channels, self.features), jnp.float32)
        bias = self.param("bias", bias_init(fan_in), (self.features,), jnp.float32)
        # Output row 2 y + s - 1 meets input rows y - 1 and y through the kernel's rows 2 + s and s.
        kernel = kernel.astype(self.dtype).reshape(2, 2, 2, 2, channels, self.features)[::-1, :, ::-1]
        kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, channels, 4 * self.features)
        x = x.astype(self.dtype)
        if self.features == 1:
            # Each input pixel adds a 2 x 2 block of phases to each of the four blocks that see it.
            out = _multiply(x, kernel.transpose(2, 0, 1, 3).reshape(channels, 16)).reshape(n, height, width, 2, 2, 4)
            places = [(a, b) for a in (0, 1) for b in (0, 1)]
            pads = [((0, 0), (1 - a, a), (1 - b, b), (0, 0)) for a, b in places]
            out = sum(jnp.pad(out[:, :, :, a, b], pad) for (a, b), pad in zip(places, pads, strict=True))
        else:
            out = _convolve(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel)
        out = out.reshape(n, height + 1, width + 1, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        out = out.reshape(n, 2 * height + 2, 2 * width + 2, self.features)[:, 1:-1, 1:-1]
        return checkpoint_name(add_bias(out, bias), EXPENSIVE)


def _multiply(x: jax.Array, matrix: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
    """[..., C] times [C, D]."""
    product = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision=precision)
    return product.reshape(*x.shape[:-1], matrix.shape[-1])


def _convolve(x: jax.Array, kernel: jax.Array, padding: str = "VALID") -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: [N, H, W, C] -> [N, H, W, C].

    ``residual`` "post": act(x + norm(conv(act(norm(conv(x)))))) (He et al. 2016, arXiv:1512.03385). "pre":
    x + conv(act(norm(conv(act(norm(x)))))), whose shortcut is the identity (He et al. 2016, arXiv:1603.05027).
    """

    axis_name: str | None = None
    dtype: Dtype = jnp.float32
    residual: Literal["post", "pre"] = "post"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        features = x.shape[-1]
        norm = {"axis_name": self.axis_name, "dtype": self.dtype}
        if self.residual == "pre":
            y = leaky_relu(Norm(**norm, name="norm1")(x, train=train))
            y = Conv(features, dtype=self.dtype, name="conv1")(y)
            y = leaky_relu(Norm(**norm, name="norm2")(y, train=train))
            y = Conv(features, dtype=self.dtype, name="conv2")(y)
            return checkpoint_name(x + y, BLOCK)
        y = Conv(features, dtype=self.dtype, name="conv1")(x)
        y = leaky_relu(Norm(**norm, name="norm1")(y, train=train))
        y = Conv(features, dtype=self.dtype, name="conv2")(y)
        y = Norm(**norm, name="norm2")(y, train=train)
        return checkpoint_name(leaky_relu(x + y), BLOCK)


def residual_stack(
    x: jax.Array,
    blocks: int,
    *,
    train: bool,
    axis_name: str | None,
    dtype: Dtype,
    residual: Literal["post", "pre"],
) -> jax.Array:
    """``blocks`` residual blocks, one after another: [N, H, W, C] -> [N, H, W, C].

    For a compact method, whose submodules ``residual1`` and so on they become.
    """
    for number in range(blocks):
        block = ResidualBlock(axis_name, dtype, residual, name=f"residual{number + 1}")
        x = block(x, train=train)
    if residual == "pre" and blocks:
        x = leaky_relu(Norm(axis_name, dtype, name="residual_norm")(x, train=train))  # the last sum had neither
    return x


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(query key^T) value, unscaled: [N, L, C], [N, L, C], [N, L, V] -> [N, L, V]. The softmax is float32.

    Queries are taken a block at a time, and the gradient computes each block's weights again, so that memory grows
    with L and not its square (Rabe and Staats 2021, "Self-attention does not need O(n^2) memory", arXiv:2112.05682).
    """

    def attend_image(image: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, keys, values = image

        @jax.checkpoint
        def attend_one(one: jax.Array) -> jax.Array:
            scores = jnp.einsum("c,kc->k", one, keys, preferred_element_type=jnp.float32)
            return jnp.einsum("k,kv->v", nn.softmax(scores).astype(values.dtype), values)

        return jax.lax.map(attend_one, queries, batch_size=QUERIES_AT_ONCE)

    # A CPU is fastest where an image's block stays in its caches; a GPU, where it has much to do at once.
    images_at_once = 1 if jax.default_backend() == "cpu" else len(query)
    return jax.lax.map(attend_image, (query, key, value), batch_size=max(1, images_at_once))


class SelfAttention(nn.Module):
    """x + gamma * attention over all h * w positions (Zhang et al. 2019, SAGAN, arXiv:1805.08318).

    Queries and keys have an eighth of the channels; their products are not scaled; gamma starts at 0, so
    the block starts as the identity.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, features = x.shape
        flat = x.reshape(n, height * width, features)

        def project(name: str, width: int) -> jax.Array:
            return Dense(width, self.dtype, name=name)(flat)

        query, key = project("query", features // 8), project("key", features // 8)
        attended = checkpoint_name(attend(query, key, project("value", features)), EXPENSIVE).reshape(x.shape)
        gamma = self.param("gamma", nn.initializers.zeros, (), jnp.float32)
        return checkpoint_name(x + gamma.astype(self.dtype) * attended, BLOCK)
