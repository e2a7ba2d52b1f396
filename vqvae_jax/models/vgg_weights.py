"""Finds, fetches, checks and reads the weights of `vgg16.VGG16`."""

import hashlib
import json
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqvae_jax.errors import WeightsError
from vqvae_jax.models import vgg16
from vqvae_jax.models.vgg16 import Convolution, Variables

RANDOM = "random"
AUTO = "auto"
"""Stand for untrained weights and for torchvision's, where a file is expected."""

# torchvision's IMAGENET1K_V1 weights as safetensors, licence BSD-3. Only what a layer needs is fetched.
REPOSITORY = "timm/vgg16.tv_in1k"
FILE = "model.safetensors"
REVISION = "3394518cba29aee1ea82a49d971be90d2dd1dab7"
CACHED_LAYER = "relu3_3"
"""What is cached reaches this layer, or the asked-for one if that is deeper."""

# What publishers say of the files that they distribute under these names.
CHECKSUMS = {
    "vgg16-397923af.pth": ("sha256", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5": ("md5", "6d6bbae143d832006294945121d1f1fc"),
}

# Input of Keras's weights: mean of RGB on [0, 255], divided by nothing; its channels are in the order BGR.
KERAS_MEAN = (123.68, 116.779, 103.939)
KERAS_NAMES = (
    ("{0}/{0}_W_1:0", "{0}/{0}_b_1:0"),  # Keras 1, and the file that Keras distributes
    ("{0}/{0}/kernel:0", "{0}/{0}/bias:0"),
    ("{0}/kernel:0", "{0}/bias:0"),
)

LARGEST_HEADER = 1 << 20
PIECE = 1 << 16
"""Bytes; a server must send as many within the time limit."""

_WAYS_ON = (
    "try again when online, or choose: --vgg-weights PATH of a file you have, --vgg-weights random (untrained), "
    "or --perceptual-weight 0 (no VGG16)"
)


class _Unusable(Exception):
    """What is wrong with some weights, and what to do if they come from the user's own file."""

    def __init__(self, problem: str, advice: str = "take a file of VGG16 (not VGG16-BN) that reaches the layer"):
        super().__init__(problem)
        self.advice = advice


def load(weights: str | Path, layer: str) -> Variables:
    """Variables for `VGG16` down to `layer`.

    Args:
      weights: RANDOM; AUTO (`cached`, fetched if need be); or a file, told by its ending: torchvision's ``.pth``,
        Keras's ``.h5`` without its top, else safetensors under torchvision's names.
      layer: from `vgg16.LAYERS`; what it does not need is neither fetched nor checked.

    Raises:
      ConfigError: the layer is unknown.
      WeightsError: the file is missing, of another format or checksum, or needs a package that is not installed;
        a tensor is missing, misshapen or not finite; or AUTO can neither be found in the cache nor fetched.
    """
    needed = vgg16.up_to(layer)
    if weights == RANDOM:
        return vgg16.random_variables(layer)
    path = cached(layer) if weights == AUTO else Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: expected VGG16 weights, found no file; mend --vgg-weights")
    try:
        _check_sum(path)
        return _READERS.get(path.suffix.lower(), _read_safetensors)(path, needed)
    except _Unusable as error:
        advice = "delete it, and it is fetched again" if weights == AUTO else error.advice
        raise WeightsError(f"{path}: {error}; {advice}") from error


def cached(layer: str) -> Path:
    """A safetensors file of torchvision's weights that reaches `layer`, fetched if this is the first time.

    It lies in $XDG_CACHE_HOME/vqvae_jax (by default ~/.cache/vqvae_jax) and is replaced as a whole or not at all.
    Fetching takes byte ranges out of the Hub's 554 MB: 7 MB down to relu3_3, 59 MB down to relu5_3. Checked are
    the pinned revision's header, the file's length by that header, each range's place and length, and each
    tensor's type, shape and finite values. The bytes themselves are vouched for by TLS alone: the Hub's checksum
    is of the whole file. HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what they do elsewhere.

    Raises:
      ConfigError: the layer is unknown.
      WeightsError: the file can be neither found nor fetched; after HF_HUB_DOWNLOAD_TIMEOUT seconds (10 by
        default) in which less than PIECE arrives, that is given up.
    """
    needed = vgg16.up_to(layer, CACHED_LAYER)
    last = list(needed.values())[-1].name
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "vqvae_jax" / f"vgg16-tv_in1k-{REVISION[:8]}-to-{last}.safetensors"
    if path.is_file():
        return path
    from safetensors.numpy import save  # noqa: PLC0415 - only for those who load weights

    content = save(_fetch(needed, last), {"source": f"https://huggingface.co/{REPOSITORY}, revision {REVISION}"})
    try:
        _write_atomically(path, content)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error}); set XDG_CACHE_HOME to a folder that can") from error
    return path


def _fetch(needed: dict[str, Convolution], last: str) -> dict[str, np.ndarray]:
    """The convolutions' tensors under torchvision's names, float32, checked."""
    import huggingface_hub  # noqa: PLC0415 - only for those who fetch
    import tqdm  # noqa: PLC0415

    url = huggingface_hub.hf_hub_url(REPOSITORY, FILE, revision=REVISION)
    try:
        start, header = _fetch_header(url)
        _check_keys(header, needed)
        entries = {key: header[key] for conv in needed.values() for key in _torchvision_keys(conv)}
        size = sum(end - begin for begin, end in (entry["data_offsets"] for entry in entries.values()))
        print(f"Fetching VGG16's weights down to {last} ({size / 1e6:.0f} MB) from {url}")
        tensors = {}
        with tqdm.tqdm(total=size, unit="B", unit_scale=True, desc="VGG16", leave=False, disable=None) as bar:
            for key, entry in entries.items():
                if entry["dtype"] != "F32":
                    raise _Unusable(f"expected {key} as F32, found {entry['dtype']}")
                values, _ = _fetch_range(url, *(start + offset for offset in entry["data_offsets"]))
                tensors[key] = np.frombuffer(values, "<f4").reshape(entry["shape"])
                bar.update(len(values))
        _from_torchvision(tensors, tensors.get, needed)
        return tensors
    # Beside our own: the HTTP library's errors, whose names depend on huggingface_hub's version; and whatever
    # reading a malformed header raises.
    except Exception as error:
        reason = " ".join(str(error).replace(url, FILE).split()) or type(error).__name__
        raise WeightsError(f"--vgg-weights auto: cannot fetch {url} ({reason}); {_WAYS_ON}") from error


def _fetch_header(url: str) -> tuple[int, dict]:
    """Where a safetensors file's data starts, and name -> {"dtype", "shape", "data_offsets"}."""
    length, total = _fetch_range(url, 0, 8)
    start = 8 + int.from_bytes(length, "little")
    if start > LARGEST_HEADER:
        raise _Unusable("expected safetensors, found no header of it")
    header = json.loads(_fetch_range(url, 8, start)[0])
    header.pop("__metadata__", None)
    expected = start + max(entry["data_offsets"][1] for entry in header.values())
    if total != expected:
        raise _Unusable(f"expected {expected} bytes by its header, found {total}")
    return start, header


def _fetch_range(url: str, begin: int, end: int) -> tuple[bytes, int]:
    """Bytes [begin, end) of what is at ``url``, and how long all of it is.

    A thread waits for them, since the HTTP library's own limits cover neither name resolution, nor what
    huggingface_hub asks beside, nor a server that sends byte by byte.
    """
    from huggingface_hub import constants  # noqa: PLC0415 - only for those who fetch
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # noqa: PLC0415

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
    wanted = f"bytes {begin}-{end - 1}"
    arrived: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        try:
            headers = {**build_hf_headers(), "Range": wanted.replace(" ", "="), "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=headers, timeout=limit, follow_redirects=True) as response:
                hf_raise_for_status(response)
                found, _, total = response.headers.get("Content-Range", "no range").partition("/")
                if found != wanted:
                    raise _Unusable(f"expected {wanted}, found {found}")
                arrived.put(int(total))
                for piece in response.iter_bytes(PIECE):
                    arrived.put(piece)
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=receive, daemon=True).start()
    items = []
    try:
        while (item := arrived.get(timeout=limit)) is not None:
            if isinstance(item, Exception):
                raise item
            items.append(item)
    except queue.Empty:
        raise TimeoutError(f"less than {PIECE} bytes in {limit} s, the limit HF_HUB_DOWNLOAD_TIMEOUT sets") from None
    total, *pieces = items
    content = b"".join(pieces)
    if len(content) != end - begin:
        raise _Unusable(f"expected {wanted}, found {len(content)} bytes")
    return content, total


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        unfinished.write_bytes(content)
        unfinished.replace(path)


def _check_sum(path: Path) -> None:
    if path.name in CHECKSUMS:
        kind, expected = CHECKSUMS[path.name]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != expected:
            raise _Unusable(f"expected {kind} {expected}, found {found}", "fetch the file again")


def _read_safetensors(path: Path, needed: dict[str, Convolution]) -> Variables:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - only for those who load weights

    try:
        with safe_open(path, framework="flax") as file:
            return _from_torchvision(file.keys(), file.get_tensor, needed)
    except (SafetensorError, OSError) as error:
        advice = "convert the weights, or fetch the file again if it was cut short"
        raise _Unusable(f"expected safetensors, found a file with '{error}'", advice) from error


def _read_torch(path: Path, needed: dict[str, Convolution]) -> Variables:
    try:
        import torch  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise _Unusable("expected PyTorch to read it, found none", "pip install -e .[torch]") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in content.items()}
    except Exception as error:  # torch.load raises a dozen kinds for a file that is not its own
        reason = str(error).partition("\n")[0]
        raise _Unusable(f"expected a PyTorch state dict, found a file with '{reason}'", "fetch it again") from error
    return _from_torchvision(tensors, lambda key: tensors[key].detach().numpy(), needed)


def _read_keras(path: Path, needed: dict[str, Convolution]) -> Variables:
    """Turned from BGR on [0, 255] to RGB on [0, 1] by the order of conv1_1's inputs, the mean and the std."""
    try:
        import h5py  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise _Unusable("expected h5py to read it, found none", "pip install -e .[h5]") from error
    params = {}
    try:
        with h5py.File(path) as file:
            for conv in needed.values():
                name = conv.name.replace("conv", "block").replace("_", "_conv")
                names = [[each.format(name) for each in pair] for pair in KERAS_NAMES]
                kernel, bias = next(filter(lambda pair: all(key in file for key in pair), names), (None, None))
                if kernel is None:
                    raise _Unusable(f"expected {' or '.join(pair[0] for pair in names)}, found none")
                shape = (3, 3, conv.in_channels, conv.out_channels)
                params[conv.name] = {
                    "kernel": _check(kernel, file[kernel][()], shape),
                    "bias": _check(bias, file[bias][()], shape[3:]),
                }
    except OSError as error:
        raise _Unusable(f"expected HDF5, found a file with '{error}'", "fetch the file again") from error
    params["conv1_1"]["kernel"] = params["conv1_1"]["kernel"][:, :, ::-1]
    return vgg16.as_variables(params, np.divide(KERAS_MEAN, 255), np.ones(3) / 255)


_READERS = {".pth": _read_torch, ".pt": _read_torch, ".h5": _read_keras, ".hdf5": _read_keras}


def _torchvision_keys(conv: Convolution) -> tuple[str, str]:
    return f"features.{conv.torchvision}.weight", f"features.{conv.torchvision}.bias"


def _from_torchvision(found: Collection[str], read: Callable[[str], Any], needed: dict[str, Convolution]) -> Variables:
    """Variables from the tensors that ``read`` gives by torchvision's names: [out, in, 3, 3] and [out]."""
    _check_keys(found, needed)
    params = {}
    for conv in needed.values():
        kernel, bias = _torchvision_keys(conv)
        shape = (conv.out_channels, conv.in_channels, 3, 3)
        params[conv.name] = {
            "kernel": _check(kernel, read(kernel), shape).transpose(2, 3, 1, 0),  # to HWIO
            "bias": _check(bias, read(bias), shape[:1]),
        }
    return vgg16.as_variables(params)


def _check_keys(found: Collection[str], needed: dict[str, Convolution]) -> None:
    reached = "no layer"
    for layer, conv in needed.items():
        for key in _torchvision_keys(conv):
            if key not in found:
                raise _Unusable(f"expected {key} for {list(needed)[-1]}, found none (the file reaches {reached})")
        reached = layer


def _check(key: str, values: Any, shape: tuple[int, ...]) -> jax.Array:
    """The tensor as float32; _Unusable where it is not of floats, of that shape and finite."""
    if values.shape != shape or not jnp.issubdtype(values.dtype, jnp.floating):
        raise _Unusable(f"expected {key} in floats of shape {shape}, found {values.dtype} of shape {values.shape}")
    values = jnp.asarray(values, jnp.float32)
    if not jnp.isfinite(values).all():
        raise _Unusable(f"expected finite numbers in {key}, found NaN or infinity")
    return values
