"""Every block equals PyTorch's, in outputs, gradients and batch statistics, to 1e-5 in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqvae_jax.models import layers

TOLERANCE = 1e-5
SHAPES = [(2, 6, 4, 3), (3, 8, 8, 16), (1, 9, 5, 8)]  # N, H, W, C; odd sides too


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def nchw(torch, x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def from_torch(module, *, transposed=False):
    """Kernel [h, w, in, out] and bias of a torch convolution."""
    axes = (2, 3, 0, 1) if transposed else (2, 3, 1, 0)
    return {"kernel": module.weight.detach().numpy().transpose(axes), "bias": module.bias.detach().numpy()}


def values_and_gradients(apply, params, x, cotangent):
    """Output, gradient of the parameters and gradient of x, for sum(output * cotangent)."""

    @jax.jit
    def run(params, x, cotangent):
        output, pull = jax.vjp(apply, params, x)
        return output, *pull(cotangent)

    return run(params, x, cotangent)


def torch_values_and_gradients(torch, module, x):
    """Output, a random cotangent and the gradient of x, as NHWC; the parameters' stay on the module."""
    x = nchw(torch, x).requires_grad_()
    output = module(x)
    cotangent = normal(*nhwc(output).shape, seed=1)
    output.backward(nchw(torch, cotangent).to(output.dtype))
    return nhwc(output), cotangent, nhwc(x.grad)


def gradients_of(module, *, transposed=False):
    axes = (2, 3, 0, 1) if transposed else (2, 3, 1, 0)
    return {"kernel": module.weight.grad.numpy().transpose(axes), "bias": module.bias.grad.numpy()}


@pytest.mark.parametrize("shape", SHAPES)
def test_downsample_equals_torch(torch, shape):
    reference = torch.nn.Conv2d(shape[-1], 6, 4, stride=2, padding=1)
    x = normal(*shape)
    expected, cotangent, dx = torch_values_and_gradients(torch, reference, x)
    params = from_torch(reference)
    found = values_and_gradients(lambda p, y: layers.Downsample(6).apply({"params": p}, y), params, x, cotangent)
    jax.tree.map(assert_close, found, (expected, gradients_of(reference), dx))


@pytest.mark.parametrize(
    ("shape", "features"), [*((shape, 6) for shape in SHAPES), ((2, 7, 3, 8), 1), ((1, 1, 1, 4), 1)]
)
def test_upsample_equals_torch(torch, shape, features):
    reference = torch.nn.ConvTranspose2d(shape[-1], features, 4, stride=2, padding=1)
    x = normal(*shape)
    expected, cotangent, dx = torch_values_and_gradients(torch, reference, x)
    assert expected.shape == (shape[0], 2 * shape[1], 2 * shape[2], features)
    params = from_torch(reference, transposed=True)
    found = values_and_gradients(lambda p, y: layers.Upsample(features).apply({"params": p}, y), params, x, cotangent)
    jax.tree.map(assert_close, found, (expected, gradients_of(reference, transposed=True), dx))


@pytest.mark.parametrize("kind", ["Downsample", "Upsample"])
def test_initial_range_is_that_of_torch(torch, kind):
    """Kernels and biases fill +-1 / sqrt(fan_in), with the fan-in as PyTorch counts it."""
    reference, module = {
        "Downsample": (torch.nn.Conv2d(24, 64, 4, 2, 1), layers.Downsample(64)),
        "Upsample": (torch.nn.ConvTranspose2d(24, 64, 4, 2, 1), layers.Upsample(64)),
    }[kind]
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 24), np.float32))["params"]
    params = jax.device_get(params)
    for found, expected in ((params["kernel"], reference.weight), (params["bias"], reference.bias)):
        assert np.isclose(np.abs(found).max(), expected.abs().max().item(), rtol=0.1)
    assert np.isclose(params["kernel"].std(), reference.weight.std().item(), rtol=0.05)


def trained_norm(torch, features):
    """A torch batch norm with statistics, scale and shift unlike the initial ones; and its variables for flax."""
    norm = torch.nn.BatchNorm2d(features)
    rng = np.random.default_rng(features)
    values = {name: rng.uniform(0.5, 1.5, features).astype(np.float32) for name in ("weight", "bias", "mean", "var")}
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(values["weight"]))
        norm.bias.copy_(torch.from_numpy(values["bias"]))
        norm.running_mean.copy_(torch.from_numpy(values["mean"]))
        norm.running_var.copy_(torch.from_numpy(values["var"]))
    params = {"scale": values["weight"], "bias": values["bias"]}
    return norm, params, {"mean": values["mean"], "var": values["var"]}


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_equals_torch(torch, shape):
    """Running variances differ in one documented way: PyTorch folds in n / (n - 1) times the batch's variance."""
    reference, params, stats = trained_norm(torch, shape[-1])
    variables = {"params": params, "batch_stats": stats}
    x = 2 * normal(*shape) + 1
    before = reference.eval()(nchw(torch, x))
    apply = jax.jit(layers.Norm().apply, static_argnames=("train", "mutable"))
    assert_close(apply(variables, x, train=False), nhwc(before))

    expected = nhwc(reference.train()(nchw(torch, x)))
    found, updated = apply(variables, x, train=True, mutable="batch_stats")
    new = updated["batch_stats"]
    n = x[..., 0].size
    unbiased = 0.9 * stats["var"] + (new["var"] - 0.9 * stats["var"]) * n / (n - 1)
    assert_close(found, expected)
    assert_close(new["mean"], reference.running_mean)
    assert_close(unbiased, reference.running_var)


@pytest.mark.parametrize("residual", ["post", "pre"])
@pytest.mark.parametrize("shape", [(2, 6, 4, 8), (1, 5, 7, 16)])
def test_residual_block_equals_torch(torch, shape, residual):
    features = shape[-1]
    conv1, conv2 = (torch.nn.Conv2d(features, features, 3, padding=1) for _ in range(2))
    (norm1, params1, stats1), (norm2, params2, stats2) = (trained_norm(torch, features) for _ in range(2))

    def activation(x):
        return torch.nn.functional.leaky_relu(x, 0.2)

    def reference(x):
        if residual == "pre":
            return x + conv2(activation(norm2(conv1(activation(norm1(x))))))
        return activation(x + norm2(conv2(activation(norm1(conv1(x))))))

    params = {
        "conv1": from_torch(conv1),
        "conv2": from_torch(conv2),
        "norm1": params1,
        "norm2": params2,
    }

    def apply(p, y):
        variables = {"params": p, "batch_stats": {"norm1": stats1, "norm2": stats2}}
        return layers.ResidualBlock(residual=residual).apply(variables, y, train=True, mutable=["batch_stats"])[0]

    x = normal(*shape)
    expected, cotangent, dx = torch_values_and_gradients(torch, reference, x)
    found, gradients, found_dx = values_and_gradients(apply, params, x, cotangent)
    assert_close(found, expected)
    assert_close(found_dx, dx)
    for name, conv in (("conv1", conv1), ("conv2", conv2)):
        np.testing.assert_allclose(gradients[name]["kernel"], gradients_of(conv)["kernel"], rtol=1e-4, atol=1e-4)


def attention_params(features):
    def dense(width, seed):
        return {"kernel": 0.3 * normal(features, width, seed=seed), "bias": 0.1 * normal(width, seed=seed)}

    widths = {"query": features // 8, "key": features // 8, "value": features}
    return {name: dense(width, seed) for seed, (name, width) in enumerate(widths.items())} | {"gamma": np.float32(0.7)}


@pytest.mark.parametrize("shape", [(2, 4, 4, 8), (1, 3, 5, 32)])
def test_self_attention_equals_torch(torch, shape):
    """The published block: 1 x 1 convolutions, softmax over keys of unscaled products, x + gamma * attention.

    PyTorch computes it in float64: its own rounding in float32 is half of the tolerance here.
    """
    n, height, width, features = shape
    params, x = attention_params(features), normal(*shape)

    def reference(y):
        def project(name):
            kernel = torch.from_numpy(np.float64(params[name]["kernel"].T[:, :, None, None]))
            return torch.nn.functional.conv2d(y, kernel, torch.from_numpy(np.float64(params[name]["bias"]))).flatten(2)

        weights = torch.softmax(torch.bmm(project("query").transpose(1, 2), project("key")), dim=-1)
        attended = torch.bmm(project("value"), weights.transpose(1, 2))
        return y + 0.7 * attended.view(n, features, height, width)

    expected, cotangent, dx = torch_values_and_gradients(torch, reference, np.float64(x))
    assert np.abs(expected - x).max() > 0.1
    found = values_and_gradients(lambda p, y: layers.SelfAttention().apply({"params": p}, y), params, x, cotangent)
    assert_close(found[0], expected)
    assert_close(found[2], dx)


def test_self_attention_starts_as_the_identity_and_can_learn():
    x = normal(2, 4, 4, 16)
    found, variables = jax.jit(layers.SelfAttention().init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(found, x)
    _, gradient, _ = values_and_gradients(layers.SelfAttention().apply, variables, x, x)
    assert gradient["params"]["gamma"] != 0


@pytest.mark.parametrize("block", [layers.Downsample, layers.Upsample])
def test_bfloat16_blocks_keep_float32_parameters(block):
    x = normal(1, 8, 8, 8)
    found, variables = jax.jit(block(8, jnp.bfloat16).init_with_output)(jax.random.key(0), x)
    assert found.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    exact = np.asarray(jax.jit(block(8).apply)(variables, x))
    assert 0 < np.abs(np.float32(found) - exact).max() < 0.05


def plain_attention(query, key, value):
    """The definition, with all scores at once."""
    return jnp.einsum("nqk,nkv->nqv", jax.nn.softmax(jnp.einsum("nqc,nkc->nqk", query, key)), value)


@pytest.mark.parametrize("length", [1, 24, layers.QUERIES_AT_ONCE, 2 * layers.QUERIES_AT_ONCE + 100])
def test_attention_by_blocks_is_attention(length):
    inputs = normal(3, length, 4), normal(3, length, 4, seed=1), normal(3, length, 6)
    cotangent = normal(3, length, 6, seed=2)

    def run(attend):
        return jax.jit(lambda *given: (attend(*given), *jax.vjp(attend, *given)[1](cotangent)))(*inputs)

    jax.tree.map(assert_close, run(layers.attend), run(plain_attention))


def test_memory_of_attention_grows_linearly():
    def temporary_bytes(attend, length):
        inputs = [jax.ShapeDtypeStruct((2, length, 8), jnp.float32)] * 3
        gradient = jax.grad(lambda *given: attend(*given).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    def growth(attend):
        return temporary_bytes(attend, 8192) / temporary_bytes(attend, 2048)

    assert growth(layers.attend) < 5
    assert growth(plain_attention) > 10
