"""The configuration as JSON, written and read; and what of it a resumed run may change."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from vqvae_jax.config import Config
from vqvae_jax.errors import ConfigError


def to_json(config: Config) -> str:
    """The configuration as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str | Path = "config.json") -> Config:
    """The configuration in ``text``, as ``to_json`` writes it.

    Raises:
      ConfigError: not JSON, an unknown or missing setting, or a value of the wrong type or range; the message names
        ``source`` and the setting.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON ({error}); restore the file or train anew") from error
    return _from_dict(Config, values, source, "")


def _from_dict(cls: type, values: Any, source: str | Path, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: {where or 'the top level'} must be an object, found {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    groups = {name for name, field in fields.items() if dataclasses.is_dataclass(field.type)}
    if odd := sorted(values.keys() ^ fields.keys()):
        state = "unknown" if odd[0] in values else "missing"
        raise ConfigError(
            f"{source}: {state} field {where}{odd[0]}; the file belongs to another version of vqvae_jax "
            "or was edited by hand"
        )
    arguments = dict(values)
    for name, value in values.items():
        if name in groups:
            arguments[name] = _from_dict(fields[name].type, value, source, f"{where}{name}.")
        else:
            _check_type(fields[name], value, source, where)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_type(field: dataclasses.Field, value: Any, source: str | Path, where: str) -> None:
    accepted = {
        bool: lambda v: type(v) is bool,
        int: lambda v: type(v) is int,
        float: lambda v: type(v) in (int, float),
        str: lambda v: isinstance(v, str),
        str | None: lambda v: v is None or isinstance(v, str),
        tuple[int, int]: lambda v: isinstance(v, list) and all(type(x) is int for x in v),
        tuple[str, ...]: lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
        tuple[float, float]: lambda v: isinstance(v, list) and all(type(x) in (int, float) for x in v),
    }
    choices = [(type(choice), choice) for choice in get_args(field.type)]
    check = accepted.get(field.type, lambda v: (type(v), v) in choices)  # 4.0 and True are no integers
    if not check(value):
        expected = field.type.__name__ if isinstance(field.type, type) else field.type
        raise ConfigError(f"{source}: {where}{field.name} is {value!r}, but must be of type {expected}")


CHANGEABLE = {
    "data": {"data", "tfds_dir", "memory_limit_gib"},
    "loss": {"vgg_weights"},
    "training": {"epochs", "sample_images", "remat"},
}
"""Fields that a resumed run may change (``epochs`` not with a cosine, which ends with them); the others would make
it another run."""


def check_resumable(old: Config, new: Config) -> None:
    """Raises ConfigError where a resumed run's configuration differs in more than CHANGEABLE."""
    if old.preset != new.preset:
        raise ConfigError(f"--preset {new.preset} with --resume, but the run was started with {old.preset}")
    for group in ("model", "data", "loss", "training", "augmentation"):
        before, after = (dataclasses.asdict(getattr(config, group)) for config in (old, new))
        fixed = {"epochs"} if old.training.schedule == "cosine" else set()
        for name, value in before.items():
            if value != after[name] and name not in CHANGEABLE.get(group, set()) - fixed:
                flag = name.replace("_", "-")
                raise ConfigError(
                    f"--{flag} {after[name]!r} with --resume, but the run was started with {value!r}; "
                    "leave the flag out, or start another run"
                )
