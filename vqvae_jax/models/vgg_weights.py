"""Finds, fetches, checks and reads the weights of `vgg16.VGG16`."""

import errno
import hashlib
import queue
import re
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
from vqvae_jax.runtime.files import cache_folder, write_whole

RANDOM = "random"
AUTO = "auto"
"""Stand for untrained weights and for torchvision's, where a file is expected."""

# torchvision's IMAGENET1K_V1 weights as safetensors, licence BSD-3. Only what a layer needs is kept.
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


def load(weights: str | Path, *layers: str) -> Variables:
    """Variables for `VGG16` down to the deepest of the layers.

    Args:
      weights: RANDOM; AUTO (`cached`, fetched if need be); or a file, told by its ending: torchvision's ``.pth``,
        Keras's ``.h5`` without its top, else safetensors under torchvision's names.
      layers: from `vgg16.LAYERS`; what they do not need is neither fetched nor checked.

    Raises:
      ConfigError: a layer is unknown.
      WeightsError: the file is missing, of another format or checksum, or needs a package that is not installed;
        a tensor is missing, misshapen or not finite; or AUTO can neither be found in the cache nor fetched.
    """
    needed = vgg16.up_to(*layers)
    layer = list(needed)[-1]
    if weights == RANDOM:
        return vgg16.random_variables(layer)
    path = cached(layer) if weights == AUTO else Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: expected VGG16 weights, found no file; mend --vgg-weights")
    try:
        if path.name in CHECKSUMS:
            _check_digest(path, *CHECKSUMS[path.name])
        return _READERS.get(path.suffix.lower(), _read_safetensors)(path, needed)
    except _Unusable as error:
        advice = "delete it, and it is fetched again" if weights == AUTO else error.advice
        raise WeightsError(f"{path}: {error}; {advice}") from error


def on_hand(weights: str | Path, *layers: str) -> Variables | None:
    """What `load` gives where trained weights lie on this machine and can be read, else None; fetches nothing.

    For measurements that can be left out. An unknown layer is a ConfigError.
    """
    if weights == RANDOM:
        return None
    try:
        if weights == AUTO and not _cache_path(*layers).is_file():
            return None
        return load(weights, *layers)
    except WeightsError:
        return None


def cached(layer: str) -> Path:
    """A safetensors file of torchvision's weights that reaches `layer`, made if this is the first time.

    It lies in the cache folder (`files.cache_folder`) and is replaced as a whole or not at all:
    7 MB down to relu3_3, 59 MB down to relu5_3. It is cut from the Hub's file of 554 MB at the pinned revision:
    from huggingface_hub's own cache if that has it, else downloaded, and deleted once cut. The 554 MB must have the
    sha256 that the Hub announces, and each tensor its type, shape and finite values. HF_ENDPOINT, HF_HUB_OFFLINE,
    HF_HOME and HF_TOKEN mean what they do elsewhere.

    Raises:
      ConfigError: the layer is unknown.
      WeightsError: the file can be neither found nor fetched or written; after HF_HUB_DOWNLOAD_TIMEOUT seconds (10
        by default) in which less than PIECE arrives, fetching is given up.
    """
    needed = vgg16.up_to(layer, CACHED_LAYER)
    path = _cache_path(layer)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            write_whole(path, _fetch(Path(folder) / FILE, needed))
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be written ({error}); set XDG_CACHE_HOME to a folder that can, with 600 MB free"
        ) from error
    return path


def _cache_path(*layers: str) -> Path:
    last = list(vgg16.up_to(*layers, CACHED_LAYER).values())[-1].name
    try:
        root = cache_folder()
    except RuntimeError as error:
        raise WeightsError(f"--vgg-weights auto: no folder to cache them in ({error}); set XDG_CACHE_HOME") from error
    return root / f"vgg16-tv_in1k-{REVISION[:8]}-to-{last}.safetensors"


def _fetch(download: Path, needed: dict[str, Convolution]) -> bytes:
    """A safetensors file of the tensors that are needed, from huggingface_hub's cache or by way of ``download``."""
    import huggingface_hub  # noqa: PLC0415 - only for those who fetch
    from safetensors import safe_open  # noqa: PLC0415
    from safetensors.numpy import save  # noqa: PLC0415

    url = huggingface_hub.hf_hub_url(REPOSITORY, FILE, revision=REVISION)
    found = huggingface_hub.try_to_load_from_cache(REPOSITORY, FILE, revision=REVISION)
    try:
        if isinstance(found, str):
            download = Path(found)
            expected = download.resolve().name  # as that cache names its files, where it can make links
        else:
            expected = _download(url, download)
        if download.name != expected:
            _check_digest(download, "sha256", expected)
        _read_safetensors(download, needed)
        keys = [key for conv in needed.values() for key in _torchvision_keys(conv)]
        with safe_open(download, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in keys}
    # Beside our own: the HTTP library's errors, whose names depend on huggingface_hub's version.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = " ".join(str(error).replace(url, FILE).split()) or type(error).__name__
        raise WeightsError(f"--vgg-weights auto: cannot fetch {url} ({reason}); {_WAYS_ON}") from error
    return save(tensors, {"source": f"https://huggingface.co/{REPOSITORY}, revision {REVISION}"})


def _download(url: str, path: Path) -> str:
    """Writes what is at ``url`` to ``path``; returns the sha256 that the Hub announces for it.

    A thread waits for it, since the HTTP library's own limits cover neither name resolution, nor what
    huggingface_hub asks beside, nor a server that sends byte by byte.
    """
    import tqdm  # noqa: PLC0415 - only for those who fetch
    from huggingface_hub import constants, get_hf_file_metadata  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # noqa: PLC0415

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
    arrived: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        try:
            arrived.put(get_hf_file_metadata(url, timeout=limit))
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=headers, timeout=limit, follow_redirects=True) as response:
                hf_raise_for_status(response)
                for piece in response.iter_bytes(PIECE):
                    arrived.put(piece)
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    def next_arrival() -> Any:
        try:
            item = arrived.get(timeout=limit)
        except queue.Empty:
            message = f"less than {PIECE} bytes in {limit} s, the limit HF_HUB_DOWNLOAD_TIMEOUT sets"
            raise TimeoutError(message) from None
        if isinstance(item, Exception):
            raise item
        return item

    threading.Thread(target=receive, daemon=True).start()
    announced = next_arrival()
    if not re.fullmatch("[0-9a-f]{64}", announced.etag or ""):
        raise _Unusable(f"expected the Hub to announce a sha256, found {announced.etag!r}")
    size = announced.size or 0
    print(f"Fetching VGG16's weights once, to keep the few that are needed ({size / 1e6:.0f} MB), from {url}")
    with (
        path.open("wb") as file,
        tqdm.tqdm(total=size, unit="B", unit_scale=True, desc="VGG16", leave=False, disable=None) as bar,
    ):
        while (piece := next_arrival()) is not None:
            file.write(piece)
            bar.update(len(piece))
    return announced.etag


def _check_digest(path: Path, kind: str, expected: str) -> None:
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
