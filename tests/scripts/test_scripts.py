"""The commands as a user meets them: what they print, what they leave, how they refuse bad input."""

import csv
import gzip
import html
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest
from conftest import ROOT, TINY, run_script
from safetensors.numpy import save_file

import vqvae_jax


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
    expected = {"config.json", "data.csv", "metrics.jsonl", "checkpoints", "samples", "eval"}
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


@pytest.mark.slow
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


def mine(line):
    """Whether a line of stdout is of the survey that training prints."""
    return line.startswith(("Warning: ", "Data: ", "Splits ", "Left out: ", "Sizes: ", "Voxels: ", "Volumes "))


def test_training_says_what_it_found_in_few_lines_and_keeps_the_table(tiny_run):
    place, printed = tiny_run
    found = [line for line in printed.splitlines() if mine(line)]
    assert 4 <= len(found) <= 12
    assert any("images of 10 cases" in line for line in found)
    with (place / "runs/tiny/data.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    assert len({row["case"] for row in rows}) == 10 and {row["role"] for row in rows} == {"image"}
    again = (place / "runs/tiny" / rows[0]["path"]).resolve()
    assert again.is_file() and "data/phantom" in again.as_posix()


def odd_name(patient):
    """Of 200 bytes, with what file systems take and programs stumble on."""
    name = f"sub-{patient:02} $x$ 'y' {{z}} [1] 患者 مريض ü"
    return name + "n" * (193 - len(name.encode())) + ".nii.gz"


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """A run on volumes of oddly named files, 3 slices each along the first axis, from foot to head; relative paths."""
    place = tmp_path_factory.mktemp("odd")
    affine = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-3, 0, 0, 0], [0, 0, 0, 1.0]])
    folder = place / "my $set$ [1]"
    folder.mkdir()
    for patient in range(8):
        voxels = np.random.default_rng(patient).integers(0, 900, (3, 32, 16)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / odd_name(patient))
    shape = {"features.0.weight": (64, 3, 3, 3), "features.0.bias": (64,)}
    save_file({name: np.full(size, 0.01, np.float32) for name, size in shape.items()}, place / "vgg.safetensors")
    done = train(
        place,
        *("--data", folder.name, "--tfds-dir", "built/sets", "--vgg-weights", "vgg.safetensors"),
        *("--perceptual-layers", "relu1_1", "--batch-size", 4, "--workdir", "runs/odd"),
    )
    assert done.returncode == 0, done.stderr
    return place, done


@pytest.mark.slow
def test_odd_names_pass_through_training_pictures_and_table(odd_run):
    place, done = odd_run
    assert "arning" not in done.stderr and "Glyph" not in done.stderr
    assert len(odd_name(0).encode()) == 200
    run = place / "runs/odd"
    assert (run / "samples/epoch_0001.png").is_file() and (run / "eval/test/reconstructions.png").is_file()
    with (run / "data.csv").open(encoding="utf-8", newline="") as file:
        assert [row["path"].rpartition("/")[2] for row in csv.DictReader(file)] == [odd_name(i) for i in range(8)]
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["slice_direction"] == "head-foot"


@pytest.mark.slow
def test_a_run_is_used_and_resumed_from_another_folder(odd_run, tmp_path):
    """Its paths were relative; the locale knows ASCII alone."""
    place, _ = odd_run
    run = tmp_path / "elsewhere"
    shutil.copytree(place / "runs/odd", run)
    before = (run / "eval/test/per_slice.csv").read_bytes()
    shutil.rmtree(run / "eval")
    away = tmp_path / "away"
    away.mkdir()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run_script("eval.py", "--workdir", run, "--report", "--platform", "cpu", cwd=away, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert (run / "eval/test/per_slice.csv").read_bytes() == before
    assert "患者 مريض".encode() in before
    assert "Built the data set" not in done.stdout
    text = (run / "eval/test/report.html").read_text(encoding="ascii")
    assert "患者 مريض" in html.unescape(text)
    done = run_script("train.py", "--resume", "--workdir", run, "--epochs", 2, "--platform", "cpu", cwd=away)
    assert done.returncode == 0, done.stderr
    assert "Resuming at step" in done.stdout and "Built the data set" not in done.stdout
    assert not list(away.iterdir())


@pytest.fixture
def evaluated(tiny_run, tmp_path):
    """A copy of the tiny run, and another data set: one patient's volume, whose last of 4 slices is empty."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0] / "runs/tiny", run)
    voxels = np.random.default_rng(0).integers(1, 900, (32, 16, 4)).astype(np.int16)
    voxels[..., 3] = 0
    write_case(tmp_path / "OTHER/sub-01/a.nii.gz", voxels)
    return run, tmp_path / "OTHER"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_another_data_set_is_evaluated_whole_into_its_own_folder(evaluated, tiny_run):
    run, other = evaluated
    before = contents(run / "eval/test")
    done = run_script("eval.py", "--workdir", run, "--data", "OTHER", "--platform", "cpu", cwd=other.parent)
    assert done.returncode == 0, done.stderr
    assert f"Written: {run / 'eval/OTHER'}/" in done.stdout
    assert "Without 1 empty slices: SSIM" in done.stdout
    assert contents(run / "eval/test") == before
    found = json.loads((run / "eval/OTHER/metrics.json").read_text())
    assert (found["slices"], found["empty_slices"], found["data"]) == (4, 1, str(other))
    with (run / "eval/OTHER/per_slice.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["empty"] for row in rows] == ["False"] * 3 + ["True"]
    ssim = [float(row["ssim"]) for row in rows]
    assert found["ssim"] == pytest.approx(np.mean(ssim))
    assert found["ssim_without_empty"] == pytest.approx(np.mean(ssim[:3]))


@pytest.mark.slow
def test_data_sets_of_one_name_and_splits_of_others_have_folders_of_their_own(evaluated, folder, monkeypatch):
    run, other = evaluated

    def evaluate(*arguments, **options):
        result = vqvae_jax.evaluate_run(run, *arguments, **options, log=lambda line: None)
        return result.folder.name, len(result.evaluation.rows)

    namesake = other.parent / "deep/OTHER"
    shutil.copytree(other, namesake)
    (namesake / "sub-01/a.nii.gz").rename(namesake / "sub-01/b.nii.gz")
    assert evaluate(data=str(other)) == ("OTHER", 4)
    first = contents(run / "eval/OTHER")
    assert evaluate(data=str(namesake)) == ("OTHER-2", 4)
    assert contents(run / "eval/OTHER") == first
    monkeypatch.chdir(other.parent)
    assert evaluate(data="OTHER") == ("OTHER", 4)
    assert evaluate(data=str(folder)) == ("set", 12)
    assert evaluate("test", data=str(folder)) == ("set-test", 2)
    folder.rename(folder.with_name("test"))
    own = contents(run / "eval/test")
    assert evaluate(data=str(folder.with_name("test"))) == ("data-test", 12)
    assert contents(run / "eval/test") == own


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and a function that gives it a size."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "none", place], check=False).returncode:
        pytest.skip("needs the right to mount")
    yield place, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_at_the_second_save_ends_in_one_line(tiny_run, small_disk):
    """The first checkpoint is kept."""
    place, resize = small_disk
    files = [path for path in (tiny_run[0] / "runs/tiny/checkpoints/9").rglob("*") if path.is_file()]  # the newest
    assert files
    resize(int(1.4 * sum(path.stat().st_blocks * 512 for path in files)))  # a folder takes nothing there
    done = train(tiny_run[0], "--epochs", 3, "--sample-images", 0, "--workdir", place / "run")
    assert refused(done, "free space", "go on with --resume"), done.stderr
    assert [path.name for path in (place / "run/checkpoints").glob("[0-9]") if (path / "crc32.json").is_file()] == ["3"]


DAMAGES = ("bad config", "no checkpoint", "corrupt checkpoint")


@pytest.mark.parametrize("damage", ["no config", *(pytest.param(kind, marks=pytest.mark.slow) for kind in DAMAGES)])
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


@pytest.mark.slow
def test_all_bad_files_are_named_at_once_or_skipped(folder, tmp_path):
    place = folder / "keras_slices_train"
    good = (place / "case_train_week_0_slice_0.nii.gz").read_bytes()
    (place / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    (place / "text.nii").write_text("not an image")
    (place / "zero.nii").write_bytes(b"")
    write_case(place / "four.nii.gz", np.zeros((8, 8, 8, 2), np.int16))
    write_case(place / "nan.nii.gz", np.full((32, 16), np.nan, np.float32))
    by_header, by_voxels = ["text.nii", "zero.nii", "four.nii.gz"], ["truncated.nii.gz", "nan.nii.gz"]
    assert refused(train(tmp_path, "--data", folder), *by_header, "3 of 17 files", "--on-bad-file skip")
    done = train(tmp_path, "--data", folder, "--on-bad-file", "skip", "--workdir", "runs/a")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in by_header + by_voxels)
    for name in by_header:
        (place / name).unlink()
    assert refused(train(tmp_path, "--data", folder), *by_voxels, "2 of 14 files", "--on-bad-file skip", "--nan zero")


@pytest.mark.slow
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
