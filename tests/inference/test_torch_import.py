"""Importing the published PyTorch model: a run that evaluates as PyTorch does, and files that are refused."""

import json
import sys

import nibabel
import numpy as np
import pytest
from conftest import run_script
from skimage.metrics import structural_similarity
from skimage.transform import resize

from vqvae_jax.errors import ConfigError, DataError, WeightsError
from vqvae_jax.inference import torch_import, trained_model
from vqvae_jax.runtime import runs

torch = pytest.importorskip("torch")
from torch_reference import VQVAE, randomise  # noqa: E402  (imports torch)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return randomise(VQVAE(hidden=16, dim=8, codes=32)).eval()


@pytest.fixture(scope="module")
def slices():
    """Four smooth slices of 64 x 32 in a scanner's intensities."""
    rng = np.random.default_rng(0)
    return [resize(rng.random((8, 4)), (64, 32), order=3) * 700 // 1 for _ in range(4)]


@pytest.fixture(scope="module")
def imported(model, slices, tmp_path_factory):
    """Folder with the imported run and a data set; what importing printed."""
    place = tmp_path_factory.mktemp("imported")
    torch.save(model.state_dict(), place / "vqvae_hipmri.pth")
    for split in ("train", "validate", "test"):
        folder = place / "set" / f"keras_slices_{split}"
        folder.mkdir(parents=True)
        for index, pixels in enumerate(slices):
            image = nibabel.Nifti1Image(pixels.astype(np.int16), np.eye(4))
            nibabel.save(image, folder / f"case_{split}_week_0_slice_{index}.nii.gz")
    done = run_script("import_torch.py", "--checkpoint", "vqvae_hipmri.pth", "--workdir", "runs/imported", cwd=place)
    assert done.returncode == 0, done.stderr
    return place, done.stdout


def test_widths_are_read_from_the_tensors(imported):
    place, printed = imported
    config = runs.load_config(place / "runs/imported")
    assert (config.model.hidden_channels, config.model.embedding_dim, config.model.num_embeddings) == (16, 8, 32)
    assert config.model.reference_flatten
    assert "16 hidden channels, 32 codes of width 8" in printed


@pytest.mark.slow
def test_the_published_protocol_gives_what_pytorch_and_scikit_image_give(imported, model, slices, record_property):
    place, _ = imported
    done = run_script(
        "eval.py", "--workdir", "runs/imported", "--data", "set", "--split", "test", "--platform", "cpu", cwd=place
    )
    assert done.returncode == 0, done.stderr
    expected = []
    for pixels in slices:
        raw = np.rint(pixels).astype(np.float32)
        scored = resize((raw - raw.mean()) / raw.std(), (256, 256), order=1, mode="edge", anti_aliasing=False)
        with torch.no_grad():
            output = model(torch.tensor(scored[None, None], dtype=torch.float32))[0][0, 0].numpy()
        expected.append(structural_similarity(output.clip(0, 1), scored.clip(0, 1).astype(np.float32), data_range=1))
    written = json.loads((place / "runs/imported/eval/set-test/metrics.json").read_text())
    worst = abs(written["ssim_reference_protocol"] - np.mean(expected))
    record_property("largest difference", float(worst))
    assert worst < 1e-4
    assert f"protocol: {np.mean(expected):.4f}" in done.stdout


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self):
        return (sys.exit, (7,))


def changed(model, **changes):
    tensors = dict(model.state_dict())
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


CASES = {
    "missing": (lambda m: changed(m, **{"encoder.bn2.running_var": None}), "encoder.bn2.running_var is missing"),
    "extra": (lambda m: changed(m, **{"decoder.conv4.weight": torch.ones(1)}), "decoder.conv4.weight is unknown"),
    "shape": (lambda m: changed(m, **{"decoder.conv1.bias": torch.ones(3)}), "decoder.conv1.bias has the shape"),
    "not finite": (
        lambda m: changed(m, **{"encoder.attention.gamma": torch.tensor([np.nan])}),
        "encoder.attention.gamma",
    ),
    "another model": (lambda m: {"fc.weight": torch.ones(2, 2)}, "encoder.conv1.weight is missing"),
    "colour": (lambda m: VQVAE(channels=3, hidden=16, dim=8, codes=32).state_dict(), "encoder.conv1.weight takes 3"),
    "not tensors": (lambda m: {"epoch": 3}, "epoch is not a tensor"),
    "not a dictionary": (lambda m: torch.ones(3), "not a state dict"),
    "code": (lambda m: {"encoder.conv1.weight": Payload()}, "not a PyTorch checkpoint of tensors alone"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_files_are_refused_by_their_first_offending_key(case, model, tmp_path):
    make, expected = CASES[case]
    torch.save(make(model), tmp_path / "wrong.pth")
    with pytest.raises(WeightsError) as refusal:
        torch_import.import_run(tmp_path / "wrong.pth", tmp_path / "run")
    assert expected in str(refusal.value)
    assert "wrong.pth" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", b"PK\x03\x04broken"])
def test_files_that_are_no_checkpoint_are_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "wrong.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"wrong\.pth"):
        torch_import.read_state_dict(tmp_path / "wrong.pth")


def test_without_torch_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"pip install -e \.\[torch\]"):
        torch_import.read_state_dict(tmp_path / "any.pth")


@pytest.mark.slow
def test_a_run_is_not_overwritten(imported):
    place, _ = imported
    done = run_script("import_torch.py", "--checkpoint", "vqvae_hipmri.pth", "--workdir", "runs/imported", cwd=place)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr


@pytest.mark.slow
def test_an_imported_run_can_be_trained_on(imported):
    place, _ = imported
    flags = ("--platform", "cpu", "--data", "set", "--epochs", 1, "--vgg-weights", "random")
    done = run_script("train.py", "--resume", "--workdir", "runs/imported", *flags, cwd=place)
    assert done.returncode == 2
    assert "--batch-size 4" in done.stderr
    assert "Traceback" not in done.stderr


def test_checkpoints_of_another_run_are_not_taken_for_the_new_ones(imported, tmp_path):
    place, _ = imported
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds another run's checkpoints"):
        torch_import.import_run(place / "vqvae_hipmri.pth", tmp_path / "run")


def test_a_tensor_that_is_not_dense_is_refused(tmp_path):
    torch.save({"encoder.conv1.weight": torch.eye(3).to_sparse()}, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match=r"encoder\.conv1\.weight cannot be read"):
        torch_import.read_state_dict(tmp_path / "wrong.pth")


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


WRAPPED = {
    "as published": (lambda s: s, []),
    "DataParallel": (lambda s: prefixed(s, "module."), ["without the prefix 'module.'"]),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), ["without the prefix '_orig_mod.'"]),
    "both": (lambda s: prefixed(s, "_orig_mod.module."), ["without the prefix '_orig_mod.module.'"]),
    "model_state_dict": (lambda s: {"epoch": 3, "model_state_dict": s}, ["under 'model_state_dict'"]),
    "state_dict": (lambda s: {"state_dict": s, "lr": 0.1}, ["under 'state_dict'"]),
    "model": (lambda s: {"model": s}, ["under 'model'"]),
    "two levels down": (lambda s: {"model": {"state_dict": s}}, ["under 'model', under 'state_dict'"]),
    "all of it": (
        lambda s: {"state_dict": {"model_state_dict": prefixed(s, "module.")}, "optimizer": {"state": {}}},
        ["under 'state_dict', under 'model_state_dict', without the prefix 'module.'"],
    ),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_state_dict_is_found_and_a_line_says_so(case, model, tmp_path):
    wrap, words = WRAPPED[case]
    torch.save(wrap(dict(model.state_dict())), tmp_path / "a.pth")
    lines = []
    found = torch_import.read_state_dict(tmp_path / "a.pth", lines.append)
    assert list(found) == list(model.state_dict())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(found[name], value.numpy())
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert line.startswith(f"{tmp_path / 'a.pth'}: ") and word in line


def test_a_state_dict_three_levels_down_is_refused(model, tmp_path):
    torch.save({"model": {"model": {"model": dict(model.state_dict())}}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="model is not a tensor but a dict"):
        torch_import.read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((20, 30), (1, 20, 30)),
        ((20, 30, 1), (1, 20, 30)),
        ((4, 20, 30), (4, 20, 30)),
        ((4, 20, 30, 1), (4, 20, 30)),
        ((1, 20, 30, 1), (1, 20, 30)),
    ],
)
def test_the_rule_for_arrays_of_images(shape, images):
    assert trained_model._three(shape) == images


@pytest.mark.parametrize(
    "shape", [(20, 30, 3), (20, 3, 30), (20, 30, 2, 1), (4, 20, 30, 3), (20,), (0, 20, 30), (1, 1, 20, 30), (20, 1, 1)]
)
def test_arrays_that_are_no_images_are_refused(shape):
    with pytest.raises(DataError, match=r"expected \[H, W\], \[H, W, 1\], \[N, H, W\]"):
        trained_model._three(shape)
