"""VGG16 equals PyTorch's at every ReLU under its weights' own input convention."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vqvae_jax.errors import ConfigError
from vqvae_jax.models import vgg16, vgg_weights

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STAND_IN = DATA / "vgg" / "vgg_imagenet_conv3_3.safetensors"
ALL = tuple(vgg16.LAYERS)
FLOAT32 = jnp.dtype(jnp.float32)


def images(shape=(2, 32, 32, 1)):
    return np.random.default_rng(0).random(shape, np.float32)


def features(variables, x, *layers, dtype=jnp.float32):
    return vgg16.VGG16(layers, dtype).apply(variables, x)


def assert_relatively_close(found, expected, limit=1e-4):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def network(torch):
    """torchvision's `vgg16().features`, from its configuration "D", with weights that keep the scale."""
    torch.manual_seed(0)
    modules, channels = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            modules.append(torch.nn.MaxPool2d(2, 2))
        else:
            modules += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            torch.nn.init.kaiming_normal_(modules[-2].weight)
            torch.nn.init.normal_(modules[-2].bias, std=0.1)
            channels = width
    return torch.nn.Sequential(*modules)


def torch_features(torch, network, x, *, keras=False):
    """What each ReLU gives for [N, H, W, 1 or 3], as NHWC; in torchvision's or Keras's input convention."""
    rgb = np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
    if keras:
        y = 255 * rgb[..., ::-1] - np.float32([103.939, 116.779, 123.68])
    else:
        y = (rgb - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    y = torch.from_numpy(y).permute(0, 3, 1, 2)
    found = []
    with torch.no_grad():
        for module in network:
            y = module(y)
            if isinstance(module, torch.nn.ReLU):
                found.append(y.permute(0, 2, 3, 1).numpy())
    return found


def state(network):
    return {f"features.{key}": value for key, value in network.state_dict().items()}


def write_safetensors(torch, network, path):
    save_file({key: value.numpy() for key, value in state(network).items()}, path)


def write_torch(torch, network, path):
    torch.save(state(network) | {"classifier.0.bias": torch.zeros(3)}, path)


def write_torch_before_1_6(torch, network, path):
    """As torchvision distributes it: not a zip."""
    torch.save(state(network), path, _use_new_zipfile_serialization=False)


def write_keras(names, torch, network, path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for conv in vgg16.LAYERS.values():
            layer = conv.name.replace("conv", "block").replace("_", "_conv")
            module = network[conv.torchvision]
            file[names[0].format(layer)] = module.weight.detach().permute(2, 3, 1, 0).numpy()
            file[names[1].format(layer)] = module.bias.detach().numpy()


write_keras_1 = partial(write_keras, ("{0}/{0}_W_1:0", "{0}/{0}_b_1:0"))
write_keras_2 = partial(write_keras, ("{0}/{0}/kernel:0", "{0}/{0}/bias:0"))
write_keras_flat = partial(write_keras, ("{0}/kernel:0", "{0}/bias:0"))
SHAPES = [(2, 32, 32, 1), (1, 32, 32, 3), (1, 38, 45, 1)]
"""The sides of the last are odd at different pools: PyTorch rounds down."""


@pytest.mark.parity
@pytest.mark.parametrize(
    ("write", "name", "shape"),
    [
        *((write_safetensors, "w.safetensors", shape) for shape in SHAPES),
        (write_torch, "w.pth", SHAPES[1]),
        (write_torch_before_1_6, "w.pth", SHAPES[0]),
        *((write_keras_1, "w.h5", shape) for shape in SHAPES),
        (write_keras_2, "w.h5", SHAPES[1]),
        (write_keras_flat, "w.h5", SHAPES[1]),
    ],
)
def test_every_layer_equals_torch(torch, network, tmp_path, *, write, name, shape):
    write(torch, network, tmp_path / name)
    found = features(vgg_weights.load(tmp_path / name, "relu5_3"), images(shape), *ALL)
    assert tuple(found) == ALL
    expected = torch_features(torch, network, images(shape), keras=name.endswith(".h5"))
    for layer, values in zip(ALL, expected, strict=True):
        assert_relatively_close(found[layer], values)


@pytest.mark.parity
@pytest.mark.skipif(not STAND_IN.exists(), reason=f"{STAND_IN} is absent")
def test_stand_in_weights_equal_torch(torch, network):
    content = {k.removeprefix("features."): torch.from_numpy(v) for k, v in load_file(STAND_IN).items()}
    network = deepcopy(network[:16])
    network.load_state_dict(content)
    found = features(vgg_weights.load(str(STAND_IN), "relu3_3"), images(), *ALL[:7])
    for layer, expected in zip(ALL[:7], torch_features(torch, network, images()), strict=True):
        assert_relatively_close(found[layer], expected)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(8, 6), (9, 7)])
def test_pool_and_its_gradient_equal_torch(torch, size):
    rng = np.random.default_rng(0)
    x = rng.permutation(2 * size[0] * size[1] * 3).reshape(2, *size, 3).astype(np.float32)  # no ties
    out, pullback = jax.vjp(vgg16.max_pool, x)
    upstream = rng.random(out.shape, np.float32)
    y = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    pooled = torch.nn.functional.max_pool2d(y, 2, 2)
    pooled.backward(torch.tensor(upstream.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(out, pooled.detach().permute(0, 2, 3, 1))
    np.testing.assert_array_equal(pullback(upstream)[0], y.grad.permute(0, 2, 3, 1))


def test_nothing_deeper_than_asked_is_computed():
    module, x = vgg16.VGG16(("relu3_1", "relu1_2")), images((1, 16, 12, 1))
    init = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    shapes, variables = jax.tree.map(jnp.shape, init)
    assert shapes == {"relu1_2": (1, 16, 12, 64), "relu3_1": (1, 4, 3, 256)}
    assert list(variables["params"]) == ["conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1"]
    assert variables == jax.tree.map(jnp.shape, vgg16.random_variables("relu3_1"))


def test_weights_without_their_input_convention_are_refused():
    params = vgg16.random_variables("relu1_1")["params"]
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="mean"):
        features({"params": params}, images(), "relu1_1")


def test_dtype_is_of_the_features_not_of_the_parameters():
    trained = vgg16.random_variables("relu2_1")
    found = features(trained, images(), "relu2_1", dtype=jnp.bfloat16)["relu2_1"]
    assert found.dtype == jnp.bfloat16
    assert_relatively_close(np.float32(found), features(trained, images(), "relu2_1")["relu2_1"], limit=0.03)
    variables = jax.eval_shape(vgg16.VGG16(dtype=jnp.bfloat16).init, jax.random.key(0), images())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {FLOAT32}


def test_random_params_are_fixed_by_the_seed_alone():
    shallow, deep = (vgg16.random_variables(layer)["params"] for layer in ("relu2_1", "relu3_1"))
    jax.tree.map(np.testing.assert_array_equal, shallow, {name: deep[name] for name in shallow})
    other = vgg16.random_variables("relu2_1", seed=1)["params"]
    assert not any(np.array_equal(shallow[name]["kernel"], other[name]["kernel"]) for name in shallow)


def test_random_params_keep_the_scale_of_activations():
    found = features(vgg16.random_variables("relu3_3"), images((2, 64, 64, 1)), *ALL[:7])
    scale = np.sqrt([np.mean(x**2) for x in found.values()])
    assert scale.max() < 3 * scale.min()


def test_unknown_layers_are_refused_with_the_known():
    for layers in (("relu3_4",), ("relu1_1", "relu3_4"), ()):
        with pytest.raises(ConfigError, match=r"relu1_1, .*, relu5_3; found .*(relu3_4|none)"):
            features({}, images(), *layers)
    with pytest.raises(ConfigError, match=r"relu5_3; found .*relu3_4"):
        vgg16.random_variables("relu3_4")


def test_images_of_a_wrong_shape_are_refused():
    for shape in ((32, 32, 1), (1, 32, 32, 2)):
        with pytest.raises(ValueError, match=r"\[N, H, W, 1\]"):
            features({}, images(shape), "relu1_1")
    with pytest.raises(ConfigError, match="16 x 16"):
        features({}, images((1, 64, 15, 1)), "relu5_1")
