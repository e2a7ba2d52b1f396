"""The configuration as JSON, written and read; and what of it a resumed run may change."""

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vqvae_jax.config import Config, PriorConfig
from vqvae_jax.errors import ConfigError

_Kind = TypeVar("_Kind", Config, PriorConfig)


def to_json(config: Config | PriorConfig) -> str:
    """A configuration as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str | Path = "config.json", kind: type[_Kind] = Config) -> _Kind:
    """The configuration of this kind in ``text``, as ``to_json`` writes it.

    Raises:
      ConfigError: not JSON, an unknown or missing setting, or a value of the wrong type or range; the message names
        ``source`` and the setting.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON ({error}); restore the file or train anew") from error
    return _from_dict(kind, values, source, "")


def _from_dict(cls: type, values: Any, source: str | Path, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: {where or 'the top level'} must be an object, found {type(values).__name__}")
    fields = get_type_hints(cls)
    groups = {name for name, kind in fields.items() if dataclasses.is_dataclass(kind)}
    if odd := sorted(values.keys() ^ fields.keys()):
        state = "unknown" if odd[0] in values else "missing"
        raise ConfigError(
            f"{source}: {state} field {where}{odd[0]}; the file belongs to another version of vqvae_jax "
            "or was edited by hand"
        )
    arguments = dict(values)
    for name, value in values.items():
        if name in groups:
            arguments[name] = _from_dict(fields[name], value, source, f"{where}{name}.")
        else:
            _check_type(f"{where}{name}", fields[name], value, source)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_type(name: str, kind: Any, value: Any, source: str | Path) -> None:
    if not _is_of(kind, value):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise ConfigError(f"{source}: {name} is {value!r}, but must be of type {expected}")


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value read from JSON is of an annotated type."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(part, value) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return (type(value), value) in [(type(choice), choice) for choice in get_args(kind)]  # 4.0 is no integer
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is_of(get_args(kind)[0], part) for part in value)
    return type(value) in ((int, float) if kind is float else (kind,))


CHANGEABLE = {
    "data": {"data", "tfds_dir", "cache_limit"},
    "loss": {"vgg_weights"},
    "training": {"epochs", "sample_images", "remat"},
}
"""Fields that a resumed run may change; the others would make it another run. ``epochs`` not with a cosine, which ends
with them, nor with a rate weight, which rises with their number."""


def check_resumable(old: Config, new: Config) -> None:
    """Raises ConfigError where a resumed run's configuration differs in more than CHANGEABLE."""
    if old.preset != new.preset:
        raise ConfigError(f"--preset {new.preset} with --resume, but the run was started with {old.preset}")
    for group in ("model", "data", "loss", "training", "augmentation"):
        before, after = (dataclasses.asdict(getattr(config, group)) for config in (old, new))
        fixed = {"epochs"} if old.training.schedule == "cosine" or old.loss.rate_weight else set()
        for name, value in before.items():
            if value != after[name] and name not in CHANGEABLE.get(group, set()) - fixed:
                flag = "from" if name == "from_run" else name.replace("_", "-")
                raise ConfigError(
                    f"--{flag} {after[name]!r} with --resume, but the run was started with {value!r}; "
                    "leave the flag out, or start another run"
                )
