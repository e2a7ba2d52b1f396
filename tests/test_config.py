"""A configuration survives its JSON, and what cannot work is refused by the name of its flag, field and file."""

import ast
import dataclasses
import inspect
import itertools
import json
import subprocess
import sys

import pytest

from vqvae_jax.config import (
    PRESETS,
    AugmentationConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
    check_resumable,
    from_json,
    to_json,
)
from vqvae_jax.errors import ConfigError

GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "augmentation": AugmentationConfig,
}
NAN, INFINITY = float("nan"), float("inf")


def edited(group, name, value):
    """The default configuration's JSON with one field set to another value."""
    values = json.loads(to_json(Config()))
    values[group][name] = value
    return json.dumps(values)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    assert PRESETS[preset].preset == preset
    assert from_json(to_json(PRESETS[preset])) == PRESETS[preset]


def test_every_field_survives_json():
    """Each field, changed to some other value that works, comes back as it went."""
    others = {int: lambda v: v + 8, float: lambda v: v / 2 or 0.25, bool: lambda v: not v, str: lambda v: v + "x"}
    special = {
        "image_size": (36, 20),
        "scale_percentiles": (1.0, 99.0),
        "slice_axis": 0,
        "data": "phantom",
        "case_pattern": r"\d+",
        "quantizer": "fsq",
        "codebook_update": "ema",
        "codebook_init": "random",
        "entropy_weight": 0.1,
        "gradient_estimator": "rotation",
        "fsq_levels": (7, 5, 4),
        "precision": "bfloat16",
        "norm": "group",
        "downsampling": 16,
        "residual": "pre",
        "levels": 2,
        "upsampling": "nearest",
        "on_bad_file": "skip",
        "fit": "resize",
        "remat": "full",
        "schedule": "cosine",
        "accumulate": 2,
        "reconstruction": "charbonnier",
        "perceptual_layers": ("relu1_2", "relu2_2"),
        "ssim_weight": 0.5,
        "ms_ssim_weight": 0.5,
    }
    for group, cls in GROUPS.items():
        for field in dataclasses.fields(cls):
            value = special[field.name] if field.name in special else others[field.type](field.default)
            assert value != field.default
            config = Config(**{group: cls(**{field.name: value})})
            assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '{"preset": "hipmri"}', to_json(Config())[:-3], "[" * 100_000, "1" * 5000],
    ids=lambda text: text[:12],
)
def test_what_is_no_configuration_is_refused_by_file(text):
    with pytest.raises(ConfigError, match=r"^runs/a/config\.json: "):
        from_json(text, "runs/a/config.json")


def test_settings_that_an_older_file_lacks_have_their_defaults():
    """Whole groups have not: without one it is no configuration."""
    model = ModelConfig(hidden_channels=32, codebook_update="ema")
    values = json.loads(to_json(Config(model=model)))
    del values["model"]["revive_below"]
    assert from_json(json.dumps(values)).model == model
    for group in GROUPS:
        rest = {name: value for name, value in values.items() if name != group}
        with pytest.raises(ConfigError, match=rf"^a/config\.json: missing field {group};"):
            from_json(json.dumps(rest), "a/config.json")


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
        ("model", "norm", "layer"),
        ("model", "residual", "none"),
        ("model", "downsampling", 8.0),
        ("model", "downsampling", 2),
        ("model", "fsq_levels", [8, 5.0]),
        ("model", "quantizer", "lfq"),
        ("data", "fit", None),
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
        ("model", "commitment_cost", -0.1),
        ("model", "commitment_cost", NAN),
        ("model", "ema_decay", 1.0),
        ("model", "revive_below", 1.0),
        ("model", "revive_below", -0.1),
        ("model", "code_dim", -1),
        ("model", "code_dim", 129),
        ("model", "entropy_weight", -0.1),
        ("model", "entropy_temperature", 0.0),
        ("model", "fsq_levels", ()),
        ("model", "fsq_levels", (8, 1)),
        ("model", "fsq_levels", (2,) * 25),
        ("data", "scale_percentiles", (99.5, 0.5)),
        ("data", "scale_percentiles", (50.0, 50.0)),
        ("data", "scale_percentiles", (0.0, 100.1)),
        ("data", "scale_percentiles", (NAN, 99.5)),
        ("data", "slice_axis", 3),
        ("data", "memory_limit_gib", -1.0),
        ("data", "phantom_cases", 0),
        ("loss", "perceptual_weight", -1.0),
        ("loss", "perceptual_weight", INFINITY),
        ("loss", "perceptual_layers", ()),
        ("loss", "perceptual_layers", ("relu1_1", "relu1_1")),
        ("loss", "ssim_weight", -0.1),
        ("loss", "ms_ssim_weight", NAN),
        ("loss", "adversarial_weight", -0.1),
        ("loss", "adversarial_weight", INFINITY),
        ("loss", "adversarial_start", -1),
        ("loss", "discriminator_channels", 0),
        ("loss", "discriminator_layers", 0),
        ("training", "epochs", 0),
        ("training", "batch_size", -8),
        ("training", "learning_rate", 0.0),
        ("training", "learning_rate", NAN),
        ("training", "learning_rate", INFINITY),
        ("training", "learning_rate", 10**400),
        ("training", "decay_epochs", 0),
        ("training", "gradient_clip", NAN),
        ("training", "seed", -1),
        ("training", "seed", 2**32),
        ("training", "accumulate", 3),
        ("training", "average_decay", 1.0),
        ("training", "warmup_steps", -1),
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
    with pytest.raises(ConfigError, match=rf"^a/config\.json: {flag}"):
        from_json(edited(group, name, value), "a/config.json")


OPTIONS = {
    "codebook_update": "ema",
    "codebook_init": "random",
    "revive_below": 0.0,
    "cosine_codes": True,
    "code_dim": 8,
    "entropy_weight": 0.1,
    "gradient_estimator": "rotation",
}
ARCHITECTURE = {"norm": "group", "downsampling": 8, "levels": 2, "residual": "pre", "upsampling": "nearest"}


@pytest.mark.parametrize(
    ("beside", "name"),
    [({"quantizer": "fsq"}, name) for name in OPTIONS]
    + [({"published_flatten": True}, name) for name in (*OPTIONS, *ARCHITECTURE, "quantizer")],
)
def test_options_that_make_no_sense_together_are_refused_by_flag(beside, name):
    reason = "--quantizer fsq" if "quantizer" in beside else "--published-flatten"
    value = {**OPTIONS, **ARCHITECTURE, "quantizer": "fsq"}[name]
    ModelConfig(**beside)
    ModelConfig(**{name: value})
    with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')} is .* with {reason}[^\n]*$"):
        ModelConfig(**beside, **{name: value})


def test_cosine_needs_more_than_two_directions():
    with pytest.raises(ConfigError, match=r"^--cosine-codes .* width 1"):
        ModelConfig(cosine_codes=True, code_dim=1)


def test_options_of_a_codebook_go_together():
    config = ModelConfig(**OPTIONS)
    assert {name: getattr(config, name) for name in OPTIONS} == OPTIONS


def test_number_of_codes_is_that_of_the_quantizer():
    assert ModelConfig(num_embeddings=300).num_codes == 300
    assert ModelConfig(num_embeddings=300, quantizer="fsq").num_codes == 1000
    assert ModelConfig(quantizer="fsq", fsq_levels=(7, 5, 4)).num_codes == 140


@pytest.mark.parametrize("downsampling", [4, 8, 16])
def test_sides_are_multiples_of_the_downsampling(downsampling):
    config = ModelConfig(downsampling=downsampling, image_size=(48, 16))
    assert config.latent_size == (48 // downsampling, 16 // downsampling)
    assert 2**config.halvings == downsampling
    with pytest.raises(ConfigError, match=rf"^--image-size .* multiples of {downsampling} "):
        ModelConfig(downsampling=downsampling, image_size=(48, 16 + downsampling // 2))
    with pytest.raises(ConfigError, match=r"^--downsampling is 5"):
        ModelConfig(downsampling=5, image_size=(80, 80))


@pytest.mark.parametrize("downsampling", [4, 8, 16])
def test_two_levels_take_one_halving_more(downsampling):
    side = 2 * downsampling
    config = ModelConfig(downsampling=downsampling, levels=2, image_size=(3 * side, side))
    assert config.latent_sizes == ((6, 2), (3, 1))
    assert config.latent_size == (6, 2)
    with pytest.raises(ConfigError, match=rf"^--image-size .* multiples of {side} "):
        ModelConfig(downsampling=downsampling, levels=2, image_size=(3 * side, side + downsampling))
    with pytest.raises(ConfigError, match=r"^--levels is 3"):
        ModelConfig(levels=3)


def test_fields_have_names_of_their_own():
    """They are flags without a prefix, beside scripts/train.py's own."""
    names = [field.name for cls in GROUPS.values() for field in dataclasses.fields(cls)]
    names += ["preset", "workdir", "resume", "platform"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("cls", GROUPS.values())
def test_every_field_has_its_help_below(cls):
    body = ast.parse(inspect.getsource(cls)).body[0].body
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr) and isinstance(text.value.value, str), field.target.id


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("training", "epochs", 60),
        ("training", "sample_images", 0),
        ("training", "remat", "none"),
        ("training", "early_stopping", 3),
        ("data", "data", "/elsewhere"),
        ("data", "tfds_dir", "elsewhere"),
        ("data", "memory_limit_gib", 1.0),
        ("loss", "vgg_weights", "vgg.safetensors"),
    ],
)
def test_a_resumed_run_may_change(group, name, value):
    check_resumable(Config(), Config(**{group: GROUPS[group](**{name: value})}))


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "hidden_channels", 64),
        ("model", "codebook_update", "ema"),
        ("model", "quantizer", "fsq"),
        ("model", "fsq_levels", (7, 5)),
        ("model", "gradient_estimator", "rotation"),
        ("data", "scale_percentiles", (1.0, 99.0)),
        ("loss", "perceptual_weight", 0.0),
        ("loss", "perceptual_layers", ("relu1_2", "relu2_2")),
        ("loss", "reconstruction", "l2"),
        ("loss", "ssim_weight", 0.5),
        ("loss", "adversarial_weight", 0.5),
        ("loss", "adversarial_start", 100),
        ("loss", "discriminator_layers", 2),
        ("training", "batch_size", 16),
        ("training", "seed", 1),
        ("training", "accumulate", 2),
        ("augmentation", "flip", True),
    ],
)
def test_a_resumed_run_may_not_change(group, name, value):
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} "):
        check_resumable(Config(), Config(**{group: GROUPS[group](**{name: value})}))


def test_a_resumed_run_may_not_change_its_preset():
    with pytest.raises(ConfigError, match=r"^--preset "):
        check_resumable(Config(), PRESETS["demo"])


def test_configuration_needs_no_jax():
    script = "import sys, vqvae_jax.config; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_cosine_ends_with_the_epochs_it_began_with():
    old, new = (Config(training=TrainingConfig(schedule="cosine", epochs=epochs)) for epochs in (50, 60))
    with pytest.raises(ConfigError, match=r"^--epochs 60 "):
        check_resumable(old, new)
