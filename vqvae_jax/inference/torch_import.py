"""Turn a model trained with the published PyTorch code into a run of this package."""

import dataclasses
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.config import PRESETS, Config
from vqvae_jax.errors import ConfigError, WeightsError
from vqvae_jax.runtime import runs
from vqvae_jax.training.checkpoint import Checkpoints, Progress
from vqvae_jax.training.state import create_train_state

Path_ = tuple[str, ...]

_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
_IGNORED = "num_batches_tracked"
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor of the state dict goes: a path in the variables, the shape it must have, and how."""

    path: Path_
    shape: tuple[int, ...]
    kind: str = "as is"

    def convert(self, value: np.ndarray) -> np.ndarray:
        if self.kind == "conv":  # OIHW
            return value.transpose(2, 3, 1, 0)
        if self.kind == "conv of a transposed one":  # IOHW: turned by half, it is a convolution
            return value[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
        if self.kind == "upsample":  # IOHW
            return value.transpose(2, 3, 0, 1)
        if self.kind == "dense":  # OI11
            return value[:, :, 0, 0].T
        return value.reshape(()) if self.kind == "scalar" else value


def read_state_dict(path: Path, log: Callable[[str], None] = print) -> dict[str, np.ndarray]:
    """The tensors of a file written by ``torch.save(model.state_dict(), path)``, as float32 arrays.

    A state dict up to two levels down (``model_state_dict``, ``state_dict``, ``model``) is found, and the prefixes of
    wrapped models (``module.``, ``_orig_mod.``) are taken off; ``log`` is given a line that says so.

    Raises:
      WeightsError: PyTorch is missing, or the file is absent, no checkpoint, or holds more than tensors.
    """
    try:
        import torch  # noqa: PLC0415  (an optional extra)
    except ImportError as error:
        raise WeightsError(
            "reading a PyTorch checkpoint needs PyTorch; install it with: pip install -e .[torch]"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"{path}: not a PyTorch checkpoint of tensors alone ({reason}); save it with "
            "torch.save(model.state_dict(), path)"
        ) from error
    tensors, how = _state_dict(found)
    if not tensors:
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not a state dict")
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(f"{path}: {key} is not a tensor but a {type(value).__name__}; not a state dict")
    prefix = _common_prefix(tensors)
    if prefix:
        how.append(f"without the prefix {prefix!r} of every name")
    if how:
        log(f"{path}: reading the state dict {', '.join(how)}")
    return {key.removeprefix(prefix): _to_numpy(key, value, path) for key, value in tensors.items()}


def _state_dict(found: Any) -> tuple[dict, list[str]]:
    """The state dict in what a file holds, up to two levels down, and where it was, for people."""
    where: list[str] = []
    for _ in range(2):
        name = next((name for name in _WRAPPERS if isinstance(found, dict) and isinstance(found.get(name), dict)), None)
        if name is None:
            break
        found = found[name]
        where.append(f"under {name!r}")
    return (found if isinstance(found, dict) else {}), where


def _common_prefix(names: Iterable[str]) -> str:
    """What wrappers of models, such as DataParallel and torch.compile, put before every name."""
    names, prefix = list(names), ""
    while step := next((p for p in _PREFIXES if all(name.startswith(prefix + p) for name in names)), ""):
        prefix += step
    return prefix


def _to_numpy(key: str, value: Any, path: Path) -> np.ndarray:
    try:
        return value.float().numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise WeightsError(f"{path}: {key} cannot be read as float32 ({reason})") from error


def convert(tensors: dict[str, np.ndarray], source: str | Path = "the state dict") -> tuple[Config, dict[str, Any]]:
    """Configuration and variables of this package's model from the published model's tensors.

    Hidden channels, D and K are read from the shapes.

    Returns:
      the ``reference`` preset with those widths and the published flattening, and the variables
      {"params": ..., "batch_stats": ...} of ``VQVAE``.

    Raises:
      WeightsError: another architecture; the message names the first key that is missing, unknown, of a
        wrong shape or not finite.
    """
    channels, hidden, dim, codes = _widths(tensors, source)
    wanted = dict(_tensors(channels, hidden, dim, codes))
    for key in [*wanted, *tensors]:
        if key not in tensors:
            raise WeightsError(f"{source}: {key} is missing; not the published VQ-VAE")
        if key not in wanted and not key.endswith(_IGNORED):
            raise WeightsError(f"{source}: {key} is unknown; not the published VQ-VAE")
    variables: dict[str, Any] = {}
    for key, target in wanted.items():
        value = tensors[key]
        if value.shape != target.shape:
            raise WeightsError(f"{source}: {key} has the shape {value.shape}, expected {target.shape}")
        if not np.isfinite(value).all():
            raise WeightsError(f"{source}: {key} holds values that are not finite")
        place = variables
        for name in target.path[:-1]:
            place = place.setdefault(name, {})
        place[target.path[-1]] = jnp.asarray(target.convert(value))
    reference = PRESETS["reference"]
    try:
        model = dataclasses.replace(
            reference.model,
            hidden_channels=hidden,
            embedding_dim=dim,
            num_embeddings=codes,
            reference_flatten=True,
        )
    except ConfigError as error:
        raise WeightsError(f"{source}: encoder.conv2.weight gives a network that cannot be built: {error}") from error
    return dataclasses.replace(reference, model=model), variables


def import_run(path: Path, run_dir: Path) -> Config:
    """Writes a run from a PyTorch checkpoint; nothing is written where the file is not the published model.

    Raises:
      WeightsError: the file cannot be used.
      ConfigError: ``run_dir`` holds a run already, or cannot be written.
    """
    config, variables = convert(read_state_dict(path), path)
    with runs.claimed(run_dir, resume=False):
        state = create_train_state(config, steps_per_epoch=1)
        params = variables.pop("params")
        _check_structure(state.params, params)
        checkpoints = Checkpoints(run_dir)
        try:
            checkpoints.save(state.replace(params=params, model_state=variables), Progress(), None)
            checkpoints.wait()
        finally:
            checkpoints.close()
        runs.save_config(run_dir, config)
    return config


def _check_structure(expected: Any, found: Any) -> None:
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (expected, found)]
    if shapes[0] != shapes[1]:
        raise AssertionError("the conversion table does not match the model")


def _widths(tensors: dict[str, np.ndarray], source: str | Path) -> tuple[int, int, int, int]:
    """Input channels, hidden channels, D and K."""
    shapes = []
    for key, rank in (("encoder.conv1.weight", 4), ("encoder.conv2.weight", 4), ("quantizer.embedding.weight", 2)):
        if key not in tensors:
            raise WeightsError(f"{source}: {key} is missing; not the published VQ-VAE")
        if tensors[key].ndim != rank:
            raise WeightsError(f"{source}: {key} has the shape {tensors[key].shape}, expected {rank} axes")
        shapes.append(tensors[key].shape)
    channels = shapes[0][1]
    if channels != 1:
        raise WeightsError(f"{source}: encoder.conv1.weight takes {channels} input channels; MRI slices have 1")
    return channels, shapes[1][0], shapes[2][1], shapes[2][0]


def _tensors(channels: int, hidden: int, dim: int, codes: int) -> Iterator[tuple[str, _Tensor]]:
    """Every tensor of the published model by its name."""
    half = hidden // 2
    yield from _conv("encoder.conv1", "encoder.down1", (half, channels, 4, 4))
    yield from _norm("encoder.bn1", "encoder.norm1", half)
    yield from _conv("encoder.conv2", "encoder.down2", (hidden, half, 4, 4))
    yield from _norm("encoder.bn2", "encoder.norm2", hidden)
    yield from _blocks("encoder", hidden)
    yield from _attention("encoder", hidden)
    yield from _conv("encoder.conv3", "encoder.conv3", (dim, hidden, 3, 3))
    yield from _norm("encoder.bn3", "encoder.norm3", dim)
    yield "quantizer.embedding.weight", _Tensor(("params", "quantizer", "codebook"), (codes, dim))
    yield from _conv("decoder.conv1", "decoder.conv1", (dim, hidden, 3, 3), "conv of a transposed one")
    yield from _norm("decoder.bn1", "decoder.norm1", hidden)
    yield from _attention("decoder", hidden)
    yield from _blocks("decoder", hidden)
    yield from _conv("decoder.conv2", "decoder.up1", (hidden, half, 4, 4), "upsample")
    yield from _norm("decoder.bn2", "decoder.norm2", half)
    yield from _conv("decoder.conv3", "decoder.up2", (half, channels, 4, 4), "upsample")


def _blocks(part: str, hidden: int) -> Iterator[tuple[str, _Tensor]]:
    for block in (0, 1):
        theirs, ours = f"{part}.res_blocks.{block}", f"{part}.residual{block + 1}"
        for number in (1, 2):
            yield from _conv(f"{theirs}.conv{number}", f"{ours}.conv{number}", (hidden, hidden, 3, 3))
            yield from _norm(f"{theirs}.bn{number}", f"{ours}.norm{number}", hidden)


def _attention(part: str, hidden: int) -> Iterator[tuple[str, _Tensor]]:
    theirs, ours = f"{part}.attention", f"{part}.attention"
    yield f"{theirs}.gamma", _Tensor(("params", *ours.split("."), "gamma"), (1,), "scalar")
    for name, features in (("query", hidden // 8), ("key", hidden // 8), ("value", hidden)):
        yield from _conv(f"{theirs}.{name}_conv", f"{ours}.{name}", (features, hidden, 1, 1), "dense")


def _conv(theirs: str, ours: str, shape: tuple[int, ...], kind: str = "conv") -> Iterator[tuple[str, _Tensor]]:
    path = ("params", *ours.split("."))
    outputs = shape[1] if kind in ("upsample", "conv of a transposed one") else shape[0]
    yield f"{theirs}.weight", _Tensor((*path, "kernel"), shape, kind)
    yield f"{theirs}.bias", _Tensor((*path, "bias"), (outputs,))


def _norm(theirs: str, ours: str, features: int) -> Iterator[tuple[str, _Tensor]]:
    for name, (collection, own) in _NORM.items():
        yield f"{theirs}.{name}", _Tensor((collection, *ours.split("."), own), (features,))
