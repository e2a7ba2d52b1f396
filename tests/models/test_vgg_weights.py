"""Weights are found, fetched once and read; what cannot be right is refused, and leaves nothing behind."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save, save_file

from vqvae_jax.errors import ConfigError, WeightsError
from vqvae_jax.models import vgg16, vgg_weights

CACHED = f"vqvae_jax/vgg16-tv_in1k-{vgg_weights.REVISION[:8]}-to-conv3_3.safetensors"
WAYS_ON = r"--vgg-weights PATH .*--vgg-weights random .*--perceptual-weight 0 [^\n]*$"


def torchvision(layer, changes=(), dtype=np.float32):
    """`random_variables` under torchvision's names, with other tensors, or none, under some keys."""
    content = {}
    for conv, one in zip(vgg16.LAYERS.values(), vgg16.random_variables(layer)["params"].values(), strict=False):
        content[f"features.{conv.torchvision}.weight"] = np.array(one["kernel"].transpose(3, 2, 0, 1), dtype)
        content[f"features.{conv.torchvision}.bias"] = np.array(one["bias"], dtype)
    return {key: value for key, value in (content | dict(changes)).items() if value is not None}


def assert_equal(found, layer, limit=0):
    expected = vgg16.random_variables(layer)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=limit, atol=limit), found, expected)


def test_random_is_untrained():
    assert_equal(vgg_weights.load("random", "relu2_1"), "relu2_1")


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 0), (np.float64, 0), (np.float16, 1e-3)])
def test_a_file_gives_back_what_was_written(tmp_path, dtype, limit):
    unneeded = {"features.5.weight": np.full(3, np.nan, np.float32)}
    save_file(torchvision("relu2_1", unneeded, dtype), tmp_path / "w")
    assert_equal(vgg_weights.load(tmp_path / "w", "relu1_2"), "relu1_2", limit)


UNUSABLE = [
    ({}, "relu3_3", r"features\.7\.weight for relu3_3.*reaches relu2_1"),
    ({"features.2.bias": None}, "relu2_1", r"features\.2\.bias for relu2_1.*reaches relu1_1"),
    ({"features.0.weight": None}, "relu1_1", r"features\.0\.weight for relu1_1.*reaches no layer"),
    ({"features.2.weight": np.zeros((3, 3, 64, 64))}, "relu2_1", r"2\.weight .*\(64, 64, 3.*\(3, 3, 64"),
    ({"features.2.bias": np.zeros(63)}, "relu1_2", r"2\.bias .*\(64,\), found .*\(63,\)"),
    ({"features.2.bias": np.zeros(64, np.int32)}, "relu1_2", r"2\.bias in floats.*found .*int32"),
    ({"features.2.bias": np.full(64, np.nan)}, "relu2_1", r"finite.*2\.bias"),
    ({"features.2.bias": np.full(64, -np.inf)}, "relu2_1", r"finite.*2\.bias"),
]


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize(("changes", "layer", "message"), UNUSABLE)
def test_unusable_tensors_are_refused(tmp_path, changes, layer, message, ending):
    path = tmp_path / f"w.{ending}"
    content = torchvision("relu2_1", changes)
    if ending == "pth":
        torch = pytest.importorskip("torch")
        torch.save({key: torch.from_numpy(value) for key, value in content.items()}, path)
    else:
        save_file(content, path)
    with pytest.raises(WeightsError, match=rf"^{path}: expected .*{message}[^\n]*; take a file[^\n]+$"):
        vgg_weights.load(path, layer)


def test_unusable_keras_tensors_are_refused(tmp_path):
    h5py, path = pytest.importorskip("h5py"), tmp_path / "w.h5"
    theano = r"\(3, 3, 3, 64\), found .*\(64, 3, 3, 3\)"
    for shape, message in (((64, 3, 3, 3), theano), (None, "block1_conv1/kernel:0, found none")):
        with h5py.File(path, "w") as file:
            if shape:
                file["block1_conv1/kernel:0"] = np.zeros(shape)
                file["block1_conv1/bias:0"] = np.zeros(64)
        with pytest.raises(WeightsError, match=rf"^{path}: expected .*{message}[^\n]*$"):
            vgg_weights.load(path, "relu1_1")


@pytest.mark.parametrize("ending", ["safetensors", "pth", "h5"])
def test_files_of_another_format_are_refused(tmp_path, ending):
    if ending != "safetensors":
        pytest.importorskip({"pth": "torch", "h5": "h5py"}[ending])
    path = tmp_path / f"w.{ending}"
    for content in (b"", b"<html>" * 100, save(torchvision("relu1_1"))[:-100]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=rf"^{path}: expected [^\n]*$"):
            vgg_weights.load(path, "relu1_1")


def test_missing_files_are_refused(tmp_path):
    for missing in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(WeightsError, match=rf"^{missing}: expected .*found no file[^\n]*$"):
            vgg_weights.load(str(missing), "relu1_1")
    with pytest.raises(ConfigError, match="relu3_4"):
        vgg_weights.load("absent", "relu3_4")


@pytest.mark.parametrize(("package", "ending"), [("torch", "pth"), ("h5py", "h5")])
def test_missing_packages_are_named(tmp_path, monkeypatch, package, ending):
    (tmp_path / f"w.{ending}").touch()
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"torch": "torch", "h5py": "h5"}[package]
    with pytest.raises(WeightsError, match=rf"w\.{ending}: .*pip install -e \.\[{extra}\]$"):
        vgg_weights.load(tmp_path / f"w.{ending}", "relu1_1")


def test_published_files_must_have_their_checksum(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = tmp_path / "vgg16-397923af.pth"
    torch.save({key: torch.from_numpy(value) for key, value in torchvision("relu1_1").items()}, path)
    with pytest.raises(WeightsError, match=rf"^{path}: expected sha256 397923af8e79.*fetch the file again$"):
        vgg_weights.load(path, "relu1_1")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(vgg_weights.CHECKSUMS, path.name, ("sha256", digest))
    assert_equal(vgg_weights.load(path, "relu1_1"), "relu1_1")


class Hub(http.server.BaseHTTPRequestHandler):
    """Announces one file and redirects to it, as the Hub does; ``server.fault`` names what goes wrong."""

    def do_HEAD(self):
        server = self.server
        path = f"/{vgg_weights.REPOSITORY}/resolve/{vgg_weights.REVISION}/{vgg_weights.FILE}"
        if self.path != path or server.fault == "absent":
            return self.send_error(404)
        digest = hashlib.sha256(server.content).hexdigest()
        announced = {"wrong checksum": digest[::-1], "no checksum": "0123abcd"}.get(server.fault, digest)
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{server.server_port}/storage")
        self.send_header("X-Linked-ETag", f'"{announced}"')
        self.send_header("X-Linked-Size", len(server.content))
        self.send_header("Content-Length", 0)
        self.end_headers()

    def do_GET(self):
        server = self.server
        if self.path != "/storage":
            return self.do_HEAD()
        server.asked += 1
        body, fault = server.content, server.fault
        self.send_response(200)
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if fault == "altered":
            body = body[:-10] + bytes([body[-10] ^ 1]) + body[-9:]
        self.wfile.write(body if fault not in ("stalls", "drips", "cut off") else body[: len(body) // 2])
        while fault in ("stalls", "drips") and not server.over.wait(0.1):
            if fault == "drips":
                self.wfile.write(b"0")

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine and an empty cache in ``tmp_path``, set for this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads, server.block_on_close = True, False
    server.content, server.fault, server.asked, server.over = save(torchvision("relu4_1")), "", 0, threading.Event()
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def files(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]


def test_weights_are_fetched_once(hub, tmp_path):
    for _ in range(2):
        assert_equal(vgg_weights.load("auto", "relu3_3"), "relu3_3")
        assert hub.asked == 1
    assert_equal(vgg_weights.load("auto", "relu1_1"), "relu1_1")
    assert hub.asked == 1 and files(tmp_path) == [CACHED]
    content = load_file(tmp_path / CACHED)
    assert len(content) == 14
    assert all(np.array_equal(content[key], value) for key, value in torchvision("relu3_3").items())


def test_weights_on_hand_are_read_and_none_are_fetched(hub, tmp_path):
    assert vgg_weights.on_hand("auto", "relu1_1", "relu2_1") is None
    assert hub.asked == 0
    vgg_weights.load("auto", "relu2_1", "relu1_1")
    assert hub.asked == 1
    assert_equal(vgg_weights.on_hand("auto", "relu1_1", "relu2_1"), "relu2_1")
    assert vgg_weights.on_hand("auto", "relu4_1") is None
    assert hub.asked == 1
    assert_equal(vgg_weights.on_hand(tmp_path / CACHED, "relu2_1", "relu1_1"), "relu2_1")
    assert vgg_weights.on_hand("random", "relu1_1") is None
    assert vgg_weights.on_hand(tmp_path / "absent", "relu1_1") is None
    (tmp_path / CACHED).write_bytes(b"damaged")
    assert vgg_weights.on_hand("auto", "relu1_1") is None


def test_deeper_layers_are_cached_apart(hub, tmp_path):
    assert_equal(vgg_weights.load("auto", "relu4_1"), "relu4_1")
    assert files(tmp_path) == [CACHED.replace("3_3", "4_1")]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("absent", "404"),
        ("stalls", "less than 65536 bytes in 1 s|timed out"),
        ("drips", "less than 65536 bytes in 1 s"),
        ("cut off", "closed|incomplete"),
        ("wrong checksum", r"expected sha256 \w{64}, found \w{64}"),
        ("altered", r"expected sha256 \w{64}, found \w{64}"),
        ("no checksum", "announce a sha256, found '0123abcd'"),
    ],
)
def test_a_failed_fetch_ends_soon_and_leaves_nothing(hub, tmp_path, fault, reason):
    hub.fault, begin = fault, time.perf_counter()
    with pytest.raises(WeightsError, match=rf"^--vgg-weights auto: .*({reason}).*{WAYS_ON}"):
        vgg_weights.load("auto", "relu3_3")
    assert time.perf_counter() - begin < 10
    assert files(tmp_path) == []
    hub.fault = ""
    assert_equal(vgg_weights.load("auto", "relu3_3"), "relu3_3")


HTML = b"<html>" * 100


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (HTML, "expected safetensors"),
        (save(torchvision("relu3_3"))[:-4], "expected safetensors"),
        (save(torchvision("relu3_2")), r"features\.14\.weight .*reaches relu3_2"),
        (save(torchvision("relu3_3", {"features.2.bias": np.full(64, np.nan, np.float32)})), r"finite.*2\.bias"),
        (save(torchvision("relu3_3", {"features.2.bias": np.zeros(63, np.float32)})), r"\(63,\)"),
    ],
)
def test_corrupt_content_is_never_cached(hub, tmp_path, content, reason):
    hub.content = content
    with pytest.raises(WeightsError, match=rf"^--vgg-weights auto: .*{reason}.*{WAYS_ON}"):
        vgg_weights.load("auto", "relu3_3")
    assert files(tmp_path) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_the_cache_of_huggingface_hub_is_used_first(hub, tmp_path, monkeypatch, damaged):
    digest = hashlib.sha256(hub.content).hexdigest()
    repository = tmp_path / "hub" / f"models--{vgg_weights.REPOSITORY.replace('/', '--')}"
    blob, link = repository / "blobs" / digest, repository / "snapshots" / vgg_weights.REVISION / vgg_weights.FILE
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_bytes(hub.content[:-1] + b"?" if damaged else hub.content)
    link.symlink_to(blob)
    if damaged:
        with pytest.raises(WeightsError, match=f"expected sha256 {digest}"):
            vgg_weights.load("auto", "relu3_3")
    else:
        assert_equal(vgg_weights.load("auto", "relu3_3"), "relu3_3")
        assert (tmp_path / CACHED).is_file()
    assert blob.is_file() and hub.asked == 0


def test_a_damaged_cache_is_named(hub, tmp_path):
    (tmp_path / CACHED).parent.mkdir()
    (tmp_path / CACHED).write_bytes(HTML)
    with pytest.raises(WeightsError, match=rf"^{tmp_path / CACHED}: .*; delete it, and it is fetched again$"):
        vgg_weights.load("auto", "relu3_3")


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    (tmp_path / "vqvae_jax").touch()
    with pytest.raises(WeightsError, match=rf"^{tmp_path / CACHED}: cannot be written .*XDG_CACHE_HOME"):
        vgg_weights.load("auto", "relu3_3")


def load_in_new_process(tmp_path, **environment):
    code = "from vqvae_jax.models import vgg_weights; vgg_weights.load('auto', 'relu3_3')"
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": str(tmp_path),
            "HF_HOME": str(tmp_path / "hub"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done, time.perf_counter() - begin


@pytest.mark.slow
def test_the_environment_of_huggingface_hub_counts(hub, tmp_path):
    done, _ = load_in_new_process(tmp_path, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert done.returncode and "offline mode" in done.stderr and not hub.asked
    done, _ = load_in_new_process(tmp_path, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0")
    assert not done.returncode and "Fetching VGG16's weights" in done.stdout and hub.endpoint in done.stdout
    assert files(tmp_path) == [CACHED]
    done, _ = load_in_new_process(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert not done.returncode and not done.stdout


def test_no_network_is_an_error_within_seconds(tmp_path):
    done, seconds = load_in_new_process(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    last = done.stderr.splitlines()[-1]
    assert "WeightsError: --vgg-weights auto: cannot fetch" in last and "--perceptual-weight 0" in last
    assert seconds < 30 and not files(tmp_path)
