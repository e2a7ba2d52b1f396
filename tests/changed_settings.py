"""Every setting of a configuration, and for each another value that works."""

import dataclasses

from vqvae_jax.config import AugmentationConfig, Config, DataConfig, LossConfig, ModelConfig, TrainingConfig

GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "augmentation": AugmentationConfig,
}
FIELDS = [(group, field.name) for group, cls in GROUPS.items() for field in dataclasses.fields(cls)]
_BY_TYPE = {int: lambda v: v + 8, float: lambda v: v / 2 or 0.25, bool: lambda v: not v, str: lambda v: v + "x"}
_SPECIAL = {
    "image_size": (36, 20),
    "scale_percentiles": (1.0, 99.0),
    "slice_axis": 0,
    "slice_direction": "head-foot",
    "nan": "zero",
    "data": "phantom",
    "case_pattern": r"\d+",
    "from_run": "runs/other",
    "codebook_update": "ema",
    "precision": "bfloat16",
    "downsampling": 16,
    "residual": "pre",
    "on_bad_file": "skip",
    "fit": "resize",
    "remat": "full",
    "reference_flatten": True,
    "learning_rate": "auto",
    "schedule": "cosine",
    "accumulate": 2,
    "reconstruction": "l2",
    "perceptual_layers": ("relu1_2", "relu2_2"),
}


def changed(group, name):
    """The default configuration with one setting changed."""
    field = next(field for field in dataclasses.fields(GROUPS[group]) if field.name == name)
    value = _SPECIAL[name] if name in _SPECIAL else _BY_TYPE[field.type](field.default)
    assert value != field.default
    return Config(**{group: GROUPS[group](**{name: value})})
