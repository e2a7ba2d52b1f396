"""What cannot work is refused by the name of its flag and file; every field is a flag with a name and help."""

import ast
import dataclasses
import inspect
import itertools
import json

import pytest
from changed_settings import GROUPS

from vqvae_jax.config import Config, ModelConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.runtime.config_file import from_json, to_json

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "image_size", (30, 16)),
        ("model", "image_size", (0, 16)),
        ("model", "image_size", (-4, 16)),
        ("model", "image_size", (32, 16, 4)),
        ("model", "hidden_channels", 12),
        ("model", "hidden_channels", 0),
        ("model", "residual_blocks", -1),
        ("model", "embedding_dim", 0),
        ("model", "num_embeddings", 1),
        ("model", "code_dim", -1),
        ("model", "code_dim", 129),
        ("data", "scale_percentiles", (99.5, 0.5)),
        ("data", "scale_percentiles", (50.0, 50.0)),
        ("data", "scale_percentiles", (0.0, 100.1)),
        ("data", "scale_percentiles", (NAN, 99.5)),
        ("data", "slice_axis", 3),
        ("data", "cache_limit", -1.0),
        ("data", "cache_limit", NAN),
        ("data", "phantom_cases", 0),
        ("data", "phantom_slices", 0),
        ("loss", "perceptual_weight", -1.0),
        ("loss", "perceptual_weight", INFINITY),
        ("loss", "perceptual_layers", ()),
        ("loss", "perceptual_layers", ("relu1_1", "relu1_1")),
        ("loss", "ssim_weight", -0.1),
        ("training", "epochs", 0),
        ("training", "batch_size", -8),
        ("training", "learning_rate", 0.0),
        ("training", "learning_rate", NAN),
        ("training", "learning_rate", INFINITY),
        ("training", "learning_rate", 10**400),
        ("training", "gradient_clip", NAN),
        ("training", "seed", -1),
        ("training", "seed", 2**32),
        ("training", "accumulate", 3),
        ("training", "warmup_steps", -1),
        ("training", "sample_images", -1),
        ("augmentation", "rotation", -1.0),
        ("augmentation", "gamma", NAN),
        ("augmentation", "zoom", 1e30),
    ],
)
def test_bad_values_are_refused_by_flag(group, name, value):
    """As a flag, and in a file, whose name is then told too."""
    flag = f"--{name.replace('_', '-')} is "
    with pytest.raises(ConfigError, match=f"^{flag}"):
        GROUPS[group](**{name: value})
    edited = json.loads(to_json(Config()))
    edited[group][name] = value
    with pytest.raises(ConfigError, match=rf"^a/config\.json: {flag}"):
        from_json(json.dumps(edited), "a/config.json")


IMPORTED = {"codebook_update": "ema", "code_dim": 8, "downsampling": 8, "residual": "pre", "attention": False}


@pytest.mark.parametrize("name", IMPORTED)
def test_what_an_imported_model_never_has_is_refused_by_flag(name):
    """It is the published architecture, whatever else its flattening is given."""
    ModelConfig(reference_flatten=True)
    ModelConfig(**{name: IMPORTED[name]})
    with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')} is .* with reference_flatten[^\n]*$"):
        ModelConfig(reference_flatten=True, **{name: IMPORTED[name]})


def test_the_width_of_a_code_is_that_of_the_latents_unless_it_is_given():
    assert ModelConfig(embedding_dim=64).codebook_dim == 64
    assert ModelConfig(embedding_dim=64, code_dim=16).codebook_dim == 16


@pytest.mark.parametrize("downsampling", [4, 8, 16])
def test_sides_are_multiples_of_the_downsampling(downsampling):
    config = ModelConfig(downsampling=downsampling, image_size=(48, 16))
    assert config.latent_size == (48 // downsampling, 16 // downsampling)
    assert 2**config.halvings == downsampling
    with pytest.raises(ConfigError, match=rf"^--image-size .* multiples of {downsampling} "):
        ModelConfig(downsampling=downsampling, image_size=(48, 16 + downsampling // 2))
    with pytest.raises(ConfigError, match=r"^--downsampling is 5"):
        ModelConfig(downsampling=5, image_size=(80, 80))


def test_fields_have_names_of_their_own():
    """They are flags without a prefix, beside scripts/train.py's own."""
    names = [field.name for cls in GROUPS.values() for field in dataclasses.fields(cls)]
    names += ["preset", "workdir", "resume", "platform", "distributed", "coordinator", "num_processes", "process_id"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("cls", GROUPS.values())
def test_every_field_has_its_help_below(cls):
    body = ast.parse(inspect.getsource(cls)).body[0].body
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr) and isinstance(text.value.value, str), field.target.id
