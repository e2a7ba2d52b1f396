"""A configuration survives its JSON; other files are refused by name and field; a resumed run keeps its settings."""

import json

import pytest
from changed_settings import FIELDS, GROUPS, changed

from vqvae_jax.config import PRESETS, Config, LossConfig, ModelConfig, TrainingConfig
from vqvae_jax.errors import ConfigError
from vqvae_jax.runtime.config_file import check_resumable, from_json, to_json


def edited(group, name, value):
    """The default configuration's JSON with one field set to another value."""
    values = json.loads(to_json(Config()))
    values[group][name] = value
    return json.dumps(values)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    assert PRESETS[preset].preset == preset
    assert from_json(to_json(PRESETS[preset])) == PRESETS[preset]


@pytest.mark.parametrize(("group", "name"), FIELDS)
def test_every_field_survives_json(group, name):
    config = changed(group, name)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '{"preset": "hipmri"}', to_json(Config())[:-3], "[" * 100_000, "1" * 5000],
    ids=lambda text: text[:12],
)
def test_what_is_no_configuration_is_refused_by_file(text):
    with pytest.raises(ConfigError, match=r"^runs/a/config\.json: "):
        from_json(text, "runs/a/config.json")


@pytest.mark.parametrize(("group", "name"), FIELDS)
def test_a_file_that_lacks_a_setting_is_refused_by_its_name(group, name):
    values = json.loads(to_json(Config()))
    del values[group][name]
    with pytest.raises(ConfigError, match=rf"^a/config\.json: missing field {group}\.{name};"):
        from_json(json.dumps(values), "a/config.json")


@pytest.mark.parametrize("group", ["preset", *GROUPS])
def test_a_file_that_lacks_a_group_is_refused_by_its_name(group):
    values = json.loads(to_json(Config(model=ModelConfig(hidden_channels=32, codebook_update="ema"))))
    del values[group]
    with pytest.raises(ConfigError, match=rf"^a/config\.json: missing field {group};"):
        from_json(json.dumps(values), "a/config.json")


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "depth", 3),  # unknown
        ("model", "hidden_channels", "256"),
        ("model", "hidden_channels", 256.0),
        ("model", "latent_norm", 1),
        ("training", "epochs", True),
        ("model", "image_size", 256),
        ("model", "image_size", [256.0, 128]),
        ("model", "precision", "float16"),
        ("model", "codebook_update", "kmeans"),
        ("model", "residual", "none"),
        ("model", "downsampling", 8.0),
        ("model", "downsampling", 2),
        ("data", "scale_percentiles", [0.5, "99.5"]),
        ("data", "fit", None),
        ("data", "nan", "keep"),
        ("data", "slice_direction", "sideways"),
        ("data", "slice_axis", 1.0),
        ("data", "slice_axis", True),
        ("data", "data", 1),
        ("loss", "perceptual_layers", None),
        ("loss", "perceptual_layers", "relu1_1"),
        ("loss", "perceptual_layers", [1]),
        ("loss", "reconstruction", "huber"),
    ],
)
def test_wrong_fields_are_refused_by_file_and_field(group, name, value):
    with pytest.raises(ConfigError, match=rf"^a/config\.json: .*{group}\.{name}"):
        from_json(edited(group, name, value), "a/config.json")


MAY_CHANGE = {
    ("training", "epochs"),
    ("training", "sample_images"),
    ("training", "remat"),
    ("data", "data"),
    ("data", "tfds_dir"),
    ("data", "cache_limit"),
    ("loss", "vgg_weights"),
}


@pytest.mark.parametrize(("group", "name"), sorted(MAY_CHANGE))
def test_a_resumed_run_may_change(group, name):
    check_resumable(Config(), changed(group, name))


@pytest.mark.parametrize(("group", "name"), [field for field in FIELDS if field not in MAY_CHANGE])
def test_a_resumed_run_may_not_change(group, name):
    flag = "from" if name == "from_run" else name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^--{flag} "):
        check_resumable(Config(), changed(group, name))


def test_a_rates_weight_rises_with_the_epochs_it_began_with():
    loss = LossConfig(rate_weight=0.1)
    old, new = (Config(loss=loss, training=TrainingConfig(epochs=epochs)) for epochs in (50, 60))
    with pytest.raises(ConfigError, match=r"^--epochs 60 "):
        check_resumable(old, new)


def test_a_resumed_run_may_not_change_its_preset():
    with pytest.raises(ConfigError, match=r"^--preset "):
        check_resumable(Config(), PRESETS["demo"])


def test_a_cosine_ends_with_the_epochs_it_began_with():
    old, new = (Config(training=TrainingConfig(schedule="cosine", epochs=epochs)) for epochs in (50, 60))
    with pytest.raises(ConfigError, match=r"^--epochs 60 "):
        check_resumable(old, new)
