"""VGG16 equals PyTorch's at every ReLU, and weights that cannot be right are refused."""

from copy import deepcopy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vqvae_jax.errors import ConfigError, WeightsError
from vqvae_jax.models import vgg16

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STAND_IN = DATA / "vgg" / "vgg_imagenet_conv3_3.safetensors"
ALL = tuple(vgg16.LAYERS)
FLOAT32 = jnp.dtype(jnp.float32)


def images(shape=(2, 32, 32, 1)):
    return np.random.default_rng(0).random(shape, np.float32)


def features(params, x, *layers, dtype=jnp.float32):
    return vgg16.VGG16(layers, dtype).apply({"params": params}, x)


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


def torch_features(torch, network, x):
    """What each ReLU gives, as NHWC."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    rgb = np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
    y = torch.from_numpy((rgb - mean) / std).permute(0, 3, 1, 2)
    found = []
    with torch.no_grad():
        for module in network:
            y = module(y)
            if isinstance(module, torch.nn.ReLU):
                found.append(y.permute(0, 2, 3, 1).numpy())
    return found


# The sides of the last, 38 and 45, are odd at different pools: PyTorch rounds down.
@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (1, 32, 32, 3), (1, 38, 45, 1)])
def test_every_layer_equals_torch(torch, network, tmp_path, shape):
    content = {f"features.{key}": value.numpy() for key, value in network.state_dict().items()}
    save_file(content, tmp_path / "w.safetensors")
    found = features(vgg16.load_params(tmp_path / "w.safetensors", "relu5_3"), images(shape), *ALL)
    assert tuple(found) == ALL
    for layer, expected in zip(ALL, torch_features(torch, network, images(shape)), strict=True):
        assert_relatively_close(found[layer], expected)


@pytest.mark.skipif(not STAND_IN.exists(), reason=f"{STAND_IN} is absent")
def test_stand_in_weights_equal_torch(torch, network):
    content = {k.removeprefix("features."): torch.from_numpy(v) for k, v in load_file(STAND_IN).items()}
    network = deepcopy(network[:16])
    network.load_state_dict(content)
    found = features(vgg16.params_for(str(STAND_IN), "relu3_3"), images(), *ALL[:7])
    for layer, expected in zip(ALL[:7], torch_features(torch, network, images()), strict=True):
        assert_relatively_close(found[layer], expected)


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
    assert variables["params"] == jax.tree.map(jnp.shape, vgg16.random_params("relu3_1"))


def test_dtype_is_of_the_features_not_of_the_parameters():
    params = vgg16.random_params("relu2_1")
    found = features(params, images(), "relu2_1", dtype=jnp.bfloat16)["relu2_1"]
    assert found.dtype == jnp.bfloat16
    assert_relatively_close(np.float32(found), features(params, images(), "relu2_1")["relu2_1"], limit=0.03)
    variables = jax.eval_shape(vgg16.VGG16(dtype=jnp.bfloat16).init, jax.random.key(0), images())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {FLOAT32}


def test_random_params_are_fixed_by_the_seed_alone():
    shallow, deep = vgg16.random_params("relu2_1"), vgg16.random_params("relu3_1")
    jax.tree.map(np.testing.assert_array_equal, shallow, {name: deep[name] for name in shallow})
    jax.tree.map(np.testing.assert_array_equal, shallow, vgg16.params_for("random", "relu2_1"))
    other = vgg16.random_params("relu2_1", seed=1)
    assert not any(np.array_equal(shallow[name]["kernel"], other[name]["kernel"]) for name in shallow)


def test_random_params_keep_the_scale_of_activations():
    found = features(vgg16.random_params("relu3_3"), images((2, 64, 64, 1)), *ALL[:7])
    scale = np.sqrt([np.mean(x**2) for x in found.values()])
    assert scale.max() < 3 * scale.min()


def test_unknown_layers_are_refused_with_the_known():
    for layers in (("relu3_4",), ("relu1_1", "relu3_4"), ()):
        with pytest.raises(ConfigError, match=r"relu1_1, .*, relu5_3; found .*(relu3_4|none)"):
            features({}, images(), *layers)
    for params_of in (vgg16.random_params, lambda layer: vgg16.load_params("absent", layer)):
        with pytest.raises(ConfigError, match=r"relu5_3; found .*relu3_4"):
            params_of("relu3_4")


def test_images_of_a_wrong_shape_are_refused():
    for shape in ((32, 32, 1), (1, 32, 32, 2)):
        with pytest.raises(ValueError, match=r"\[N, H, W, 1\]"):
            features({}, images(shape), "relu1_1")
    with pytest.raises(ConfigError, match="16 x 16"):
        features({}, images((1, 64, 15, 1)), "relu5_1")


def write(path, changes, dtype=np.float32):
    """`random_params` as a file that reaches relu2_1, with other tensors, or none, under some keys."""
    content = {}
    for index, one in zip((0, 2, 5), vgg16.random_params("relu2_1").values(), strict=True):
        content[f"features.{index}.weight"] = np.asarray(one["kernel"], dtype).transpose(3, 2, 0, 1).copy()
        content[f"features.{index}.bias"] = np.asarray(one["bias"], dtype)
    save_file({key: value for key, value in (content | changes).items() if value is not None}, path)
    return path


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 0), (np.float64, 0), (np.float16, 1e-3)])
def test_a_file_gives_back_what_was_written(tmp_path, dtype, limit):
    unneeded = {"features.5.weight": np.full(3, np.nan, np.float32)}
    found = vgg16.load_params(write(tmp_path / "w", unneeded, dtype), "relu1_2")
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {FLOAT32}
    jax.tree.map(lambda *pair: assert_relatively_close(*pair, limit), found, vgg16.random_params("relu1_2"))


@pytest.mark.parametrize(
    ("changes", "layer", "message"),
    [
        ({}, "relu3_3", r"features\.7\.weight for relu3_3.*reaches relu2_1"),
        ({"features.2.bias": None}, "relu2_1", r"features\.2\.bias for relu2_1.*reaches relu1_1"),
        ({"features.0.weight": None}, "relu1_1", r"features\.0\.weight for relu1_1.*reaches no layer"),
        ({"features.2.weight": np.zeros((3, 3, 64, 64))}, "relu2_1", r"2\.weight .*\(64, 64, 3.*\(3, 3, 64"),
        ({"features.2.bias": np.zeros(63)}, "relu1_2", r"2\.bias .*\(64,\), found .*\(63,\)"),
        ({"features.2.bias": np.zeros(64, np.int32)}, "relu1_2", r"2\.bias in floats.*found int32"),
        ({"features.2.bias": np.full(64, np.nan)}, "relu2_1", r"finite.*2\.bias"),
        ({"features.2.bias": np.full(64, -np.inf)}, "relu2_1", r"finite.*2\.bias"),
    ],
)
def test_unusable_tensors_are_refused(tmp_path, changes, layer, message):
    path = write(tmp_path / "w.safetensors", changes)
    with pytest.raises(WeightsError, match=rf"^{path}: expected .*{message}[^\n]*; take a file[^\n]+$"):
        vgg16.load_params(path, layer)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    for content in (b"", b"<html>" * 100, write(path, {}).read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=rf"^{path}: expected safetensors, [^\n]* cut short$"):
            vgg16.params_for(str(path), "relu1_1")
    for missing in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(WeightsError, match=rf"^{missing}: expected .*found no file[^\n]*$"):
            vgg16.params_for(str(missing), "relu1_1")
