"""scripts/reconstruct.py as a user meets it: files and folders in, files and folders out."""

import json
import shutil
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
from conftest import ROOT, run_script
from test_scripts import refused, write_case


@pytest.fixture
def place(tiny_run, tmp_path):
    """A folder with the tiny run, and in/ with a slice, a volume below it, and what is no image."""
    (tmp_path / "runs").symlink_to(tiny_run[0] / "runs")
    write_case(tmp_path / "in/a.nii.gz")
    write_case(tmp_path / "in/below/b.nii", np.random.default_rng(0).integers(0, 999, (32, 16, 3)).astype(np.uint16))
    (tmp_path / "in/notes.txt").write_text("not an image")
    return tmp_path


def reconstruct(place, *arguments):
    return run_script("reconstruct.py", *arguments, "--workdir", "runs/tiny", "--platform", "cpu", cwd=place)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.slow
def test_a_folder_is_mirrored_and_a_bad_file_does_not_stop_the_others(place):
    (place / "in/aa.nii").write_bytes(b"broken")
    done = reconstruct(place, "in", "out", "--difference", "differences")
    assert refused(done, "in/aa.nii", "is not a NIfTI file")
    assert files_in(place / "out") == files_in(place / "differences") == ["a.nii.gz", "below/b.nii"]
    slice_line, volume_line = done.stdout.splitlines()[-2:]
    assert slice_line.startswith("out/a.nii.gz: SSIM ") and " dB, one slice" in slice_line
    assert "PSNR" in volume_line and "3 slices along axis 2 (" in volume_line
    written, original, difference = (
        nibabel.load(place / folder / "below/b.nii") for folder in ("out", "in", "differences")
    )
    assert written.header == original.header
    np.testing.assert_allclose(difference.get_fdata(), written.get_fdata() - original.get_fdata(), atol=0.51)
    assert refused(reconstruct(place, "in/a.nii.gz", "out/a.nii.gz"), "out/a.nii.gz: exists", "--overwrite")
    replaced = reconstruct(place, "in/a.nii.gz", "out/a.nii.gz", "--overwrite", "--slice-axis", 1)
    assert replaced.returncode == 0, replaced.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("in", "in"), ("is the input itself",)),
        (("in", "in/out"), ("lies in the input's folder",)),
        (("in", "out", "--difference", "in/d"), ("--difference lies in",)),
        (("none", "out"), ("none: does not exist",)),
        (("in", "in/notes.txt"), ("is a file, but the input a folder",)),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(place, arguments, words):
    before = files_in(place / "in")
    assert refused(reconstruct(place, *arguments), *words)
    assert files_in(place / "in") == before
    assert not (place / "out").exists()


def test_an_output_that_is_another_input_is_refused(place):
    for name in ("deep/a.nii", "deep/deep/a.nii"):
        write_case(place / name, np.arange(32 * 16, dtype=np.int16).reshape(32, 16))
    before = files_in(place / "deep")
    assert refused(reconstruct(place, "deep", ".", "--overwrite"), "deep/a.nii: is a file of the input")
    assert files_in(place / "deep") == before


@pytest.mark.slow
def test_a_volume_that_cannot_be_cut_as_in_training_is_a_warning(place, tmp_path):
    """Said by both commands that cut; --slice-axis settles it."""
    run = tmp_path / "along"
    shutil.copytree(place / "runs/tiny", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["slice_direction"] = "head-foot"
    (run / "config.json").write_text(json.dumps(config))
    voxels = np.random.default_rng(0).integers(0, 999, (32, 16, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, None), place / "lost.nii")
    flags = ("--workdir", run, "--platform", "cpu")
    warning = "Warning: lost.nii: the header does not say which axis is head-foot; --slice-axis settles it"
    for command, name in (("reconstruct.py", "out.nii"), ("encode.py", "out.vqz")):
        done = run_script(command, "lost.nii", name, *flags, cwd=place)
        assert done.returncode == 0, done.stderr
        assert warning in done.stdout.splitlines()
        settled = run_script(command, "lost.nii", name, *flags, "--slice-axis", 2, "--overwrite", cwd=place)
        assert settled.returncode == 0 and "Warning" not in settled.stdout


LONGEST = "x" * 246 + ".nii"
"""250 bytes; back from codes it ends in .nii.gz, and has 253."""
ODD = "患者 مريض $x$ [1].nii.gz"


@pytest.mark.slow
def test_odd_names_and_the_longest_come_out_as_they_went_in(place):
    """There and back, in a locale that knows ASCII alone."""
    for name in (LONGEST, ODD):
        write_case(place / "odd" / name)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    flags = ("--workdir", "runs/tiny", "--platform", "cpu")
    for command, source, target in (
        ("reconstruct.py", "odd", "out"),
        ("encode.py", "odd", "codes"),
        ("decode.py", "codes", "back"),
    ):
        done = run_script(command, source, target, *flags, cwd=place, **ascii_only)
        assert done.returncode == 0, done.stderr
    assert files_in(place / "out") == files_in(place / "odd") == sorted([LONGEST, ODD])
    for name in files_in(place / "back"):
        written = nibabel.load(place / "back" / name).get_fdata()
        like = name if name == ODD else name.removesuffix(".gz")
        np.testing.assert_array_equal(written, nibabel.load(place / "out" / like).get_fdata())


def test_ctrl_c_leaves_no_part_of_a_file(place):
    write_case(place / "in/below/long.nii", np.random.default_rng(0).integers(0, 999, (32, 16, 30000), np.int16))
    command = [sys.executable, ROOT / "scripts/reconstruct.py", "in", "out", "--workdir", "runs/tiny"]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as working:
        while "b.nii" not in working.stdout.readline():
            assert working.poll() is None
        time.sleep(0.5)
        working.send_signal(signal.SIGINT)
        _, complaint = working.communicate(timeout=60)
    assert working.returncode == 130
    assert "interrupted" in complaint and "Traceback" not in complaint
    assert files_in(place / "out") == ["a.nii.gz", "below/b.nii"]
