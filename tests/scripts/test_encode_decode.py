"""scripts/encode.py and decode.py as a user meets them."""

import signal
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from conftest import ROOT, run_script

import vqvae_jax


def write_volume(path, shape=(30, 20, 5), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).gamma(2, 200, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.5, 0.5, 3, 1])), path)


def lines(done):
    return [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]


@pytest.mark.slow
def test_a_folder_there_and_back_with_a_bad_file_in_each(tiny_run, tmp_path):
    write_volume(tmp_path / "in/one.nii.gz")
    write_volume(tmp_path / "in/deep/two.nii", seed=1)
    write_volume(tmp_path / "in/slice.nii", shape=(40, 16))
    (tmp_path / "in/bad.nii").write_text("no image")
    place = tiny_run[0]
    done = run_script("encode.py", tmp_path / "in", tmp_path / "codes", "--platform", "cpu", cwd=place)
    assert done.returncode == 2, done.stderr
    assert len(lines(done)) == 1
    assert "bad.nii is not a NIfTI file" in lines(done)[0]
    made = sorted(path.relative_to(tmp_path / "codes") for path in (tmp_path / "codes").rglob("*.*"))
    assert [str(path) for path in made] == ["deep/two.vqz", "one.vqz", "slice.vqz"]
    assert done.stdout.count("bits per pixel") == 3

    content = bytearray((tmp_path / "codes/one.vqz").read_bytes())
    (tmp_path / "codes/cut.vqz").write_bytes(content[:-9])
    done = run_script("decode.py", tmp_path / "codes", tmp_path / "out", "--platform", "cpu", cwd=place)
    assert done.returncode == 2, done.stderr
    assert len(lines(done)) == 1
    assert "cut.vqz: is truncated" in lines(done)[0]

    model = vqvae_jax.load(place / "runs/tiny")
    for name_in, name_out in (("one.nii.gz", "one"), ("deep/two.nii", "deep/two"), ("slice.nii", "slice")):
        model.reconstruct_nifti(tmp_path / "in" / name_in, tmp_path / "expected.nii.gz", overwrite=True)
        decoded = (tmp_path / f"out/{name_out}.nii.gz").read_bytes()
        assert decoded == (tmp_path / "expected.nii.gz").read_bytes()


@pytest.mark.slow
def test_a_jax_of_64_bits_reads_what_one_of_32_wrote_and_the_other_way_round(tiny_run, tmp_path):
    write_volume(tmp_path / "in.nii.gz")

    def run(name, source, target, bits):
        place = {"cwd": tiny_run[0], "JAX_ENABLE_X64": str(int(bits == 64))}
        done = run_script(name, tmp_path / source, tmp_path / target, "--platform", "cpu", **place)
        assert done.returncode == 0, done.stderr

    run("reconstruct.py", "in.nii.gz", "expected.nii.gz", 32)
    for encoding, decoding in ((64, 32), (32, 64)):
        run("encode.py", "in.nii.gz", f"{encoding}.vqz", encoding)
        run("decode.py", f"{encoding}.vqz", f"by{decoding}.nii.gz", decoding)
        assert (tmp_path / f"by{decoding}.nii.gz").read_bytes() == (tmp_path / "expected.nii.gz").read_bytes()
    assert (tmp_path / "32.vqz").read_bytes() == (tmp_path / "64.vqz").read_bytes()


def test_two_files_for_one_name_are_refused(tiny_run, tmp_path):
    write_volume(tmp_path / "in/a.nii")
    write_volume(tmp_path / "in/a.nii.gz")
    done = run_script("encode.py", tmp_path / "in", tmp_path / "codes", cwd=tiny_run[0])
    assert done.returncode == 2
    assert len(lines(done)) == 1
    assert "both become a.vqz" in lines(done)[0]
    assert not (tmp_path / "codes").exists()


def test_ctrl_c_leaves_nothing(tiny_run, tmp_path):
    write_volume(tmp_path / "in.nii", shape=(128, 128, 500))
    command = [sys.executable, ROOT / "scripts/encode.py", tmp_path / "in.nii", tmp_path / "out" / "a.vqz"]
    with subprocess.Popen(
        command, cwd=tiny_run[0], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as encoding:
        assert encoding.stdout.readline().startswith("Run:")
        encoding.send_signal(signal.SIGINT)
        error = encoding.communicate(timeout=60)[1]
    assert encoding.returncode == 130, error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*vqz*"))
