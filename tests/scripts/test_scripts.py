"""The commands as a user meets them: what they print, what they leave, how they refuse bad input."""

import gzip
import io
import json
import shutil
import signal
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest
from conftest import ROOT, TINY, run_script


def write_case(path, voxels=None):
    """A readable NIfTI file of 32 x 16 pixels, or of the given voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if voxels is None:
        voxels = np.random.default_rng(len(path.name)).integers(0, 500, (32, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)


@pytest.fixture
def folder(tmp_path):
    """A HipMRI-like folder of 8 training, 2 validation and 2 test slices."""
    for split, count in (("train", 8), ("validate", 2), ("test", 2)):
        for index in range(count):
            write_case(tmp_path / "set" / f"keras_slices_{split}" / f"case_{split}_week_0_slice_{index}.nii.gz")
    return tmp_path / "set"


def train(cwd, *arguments):
    return run_script("train.py", *TINY, "--epochs", 1, *arguments, cwd=cwd)


def refused(done, *words):
    """One line on stderr that has all the words, status 2, no traceback."""
    lines = [line for line in done.stderr.splitlines() if "%|" not in line and line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert str(word) in lines[0]
    return True


def test_training_says_what_it_did_and_what_to_do_next(tiny_run):
    place, printed = tiny_run
    assert "Epoch [3/3], Loss: " in printed
    assert "Average SSIM: " in printed
    assert "UNTRAINED" in printed
    assert "Next: python scripts/report.py --workdir runs/tiny" in printed
    run = place / "runs/tiny"
    expected = {"config.json", "metrics.jsonl", "checkpoints", "samples", "eval"}
    assert expected <= {path.name for path in run.iterdir()}
    assert list(run.glob("events.out.tfevents.*"))
    assert len(list((run / "samples").glob("*.png"))) == 3


def test_eval_needs_no_flag_and_agrees_with_training(tiny_run):
    place, printed = tiny_run
    done = run_script("eval.py", cwd=place)
    assert done.returncode == 0, done.stderr
    average = next(line for line in printed.splitlines() if "Average SSIM" in line).strip()
    assert average in done.stdout
    written = json.loads((place / "runs/tiny/eval/test/metrics.json").read_text())
    assert f"{written['ssim']:.4f}" in average
    assert "data_range 1" in written["protocol"]
    rows = (place / "runs/tiny/eval/test/per_slice.csv").read_text().splitlines()
    assert len(rows) == 1 + written["slices"]


def test_a_workdir_that_holds_a_run_is_refused(tiny_run):
    place, _ = tiny_run
    assert refused(train(place, "--workdir", "runs/tiny"), "runs/tiny", "--resume")


def test_resuming_with_another_network_is_refused(tiny_run):
    place, _ = tiny_run
    done = run_script("train.py", "--resume", "--workdir", "runs/tiny", "--hidden-channels", 16, cwd=place)
    assert refused(done, "--hidden-channels", "8")


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, ROOT / "scripts/train.py", *TINY, "--epochs", "5000", "--workdir", "runs/stopped"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as training:
        while "Epoch [2/" not in training.stdout.readline():
            assert training.poll() is None
        training.send_signal(signal.SIGTERM)
        rest = training.communicate(timeout=60)[0]
    assert training.returncode == 0
    assert "Go on with: python scripts/train.py --resume --workdir runs/stopped" in rest
    done = run_script(
        "train.py", "--resume", "--workdir", "runs/stopped", "--epochs", 2, "--platform", "cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Resuming at step" in done.stdout
    assert "Average SSIM" in done.stdout


@pytest.mark.parametrize("damage", ["no config", "bad config", "no checkpoint", "corrupt checkpoint"])
def test_eval_refuses_a_damaged_run(tiny_run, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0] / "runs/tiny", run)
    if damage == "no config":
        (run / "config.json").unlink()
    elif damage == "bad config":
        (run / "config.json").write_text("{")
    elif damage == "no checkpoint":
        shutil.rmtree(run / "checkpoints")
    else:
        for path in run.glob("checkpoints/*/model/**/d/*"):
            path.write_bytes(bytes(reversed(path.read_bytes())))
    done = run_script("eval.py", "--workdir", run, "--platform", "cpu", cwd=tiny_run[0])
    assert refused(done, run)


def test_no_data(tmp_path):
    done = run_script("train.py", "--platform", "cpu", "--perceptual-weight", 0, cwd=tmp_path)
    assert refused(done, "data/HipMRI_study_keras_slices_data", "--preset demo")
    assert refused(train(tmp_path, "--data", "nowhere"), "--data nowhere", "no such file")


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(train(tmp_path, "--data", "empty"), "empty", "holds no .nii")


def test_all_bad_files_are_named_at_once_or_skipped(folder, tmp_path):
    place = folder / "keras_slices_train"
    good = (place / "case_train_week_0_slice_0.nii.gz").read_bytes()
    (place / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    (place / "text.nii").write_text("not an image")
    (place / "zero.nii").write_bytes(b"")
    write_case(place / "four.nii.gz", np.zeros((8, 8, 8, 2), np.int16))
    write_case(place / "nan.nii.gz", np.full((32, 16), np.nan, np.float32))
    names = ["truncated.nii.gz", "text.nii", "zero.nii", "four.nii.gz", "nan.nii.gz"]
    assert refused(train(tmp_path, "--data", folder), *names, "5 of 17 files", "--on-bad-file skip")
    done = train(tmp_path, "--data", folder, "--on-bad-file", "skip", "--workdir", "runs/a")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names)


def test_a_constant_slice_trains_with_a_warning(folder, tmp_path):
    write_case(folder / "keras_slices_test" / "case_flat_week_0_slice_0.nii.gz", np.full((32, 16), 7, np.int16))
    done = train(tmp_path, "--data", folder, "--workdir", "runs/a")
    assert done.returncode == 0, done.stderr
    assert "1 constant file(s)" in done.stdout
    assert "case_flat" in done.stdout
    assert "nan" not in done.stdout.lower()


def test_a_zip_that_reaches_outside_itself(tmp_path):
    buffer = io.BytesIO()
    nibabel.Nifti1Image(np.zeros((8, 8), np.int16), np.eye(4)).to_stream(buffer)
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../escaped.nii.gz", gzip.compress(buffer.getvalue()))
    assert refused(train(tmp_path, "--data", "evil.zip"), "evil.zip", "../escaped.nii.gz")
    assert not (tmp_path.parent / "escaped.nii.gz").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-size", "30", "16"], ["--image-size", "multiples of 4"]),
        (["--learning-rate", "-1"], ["--learning-rate"]),
        (["--perceptual-layers", "relu9_9"], ["relu9_9"]),
        (["--vgg-weights", "missing.safetensors"], ["missing.safetensors"]),
        (["--batch-size", "64"], ["--batch-size"]),
        (["--workdir", "/proc/nowhere"], ["--workdir /proc/nowhere"]),
    ],
)
def test_bad_settings(tiny_run, flags, words):
    assert refused(train(tiny_run[0], *flags), *words)


def test_an_unknown_flag(tmp_path):
    done = train(tmp_path, "--hidden-chanels", "8")
    assert done.returncode == 2
    assert "--hidden-chanels" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_gpu(tmp_path):
    done = run_script("train.py", "--platform", "gpu", "--preset", "demo", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert refused(done, "--platform gpu", "requirements-cuda.txt", "--platform cpu")
