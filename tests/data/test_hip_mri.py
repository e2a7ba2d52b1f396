"""Building the data set: records true to the files, built once and whole or not at all, every bad file named."""

import gzip
import itertools
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from vqvae_jax.config import DataConfig
from vqvae_jax.data import hip_mri, loader, source
from vqvae_jax.data.splits import SPLIT_FOLDERS, SPLITS
from vqvae_jax.errors import DataError

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "prostatex"
AFFINE = np.array([[0, 0.8, 0, -30], [-1.2, 0, 0, 44], [0, 0, 3, 7], [0, 0, 0, 1.0]])
SHAPES = {"train": [(16, 8), (16, 9), (16, 8, 1)], "validation": [(16, 8)], "test": [(16, 8), (1, 16, 9)]}


def write(path, voxels):
    nibabel.Nifti1Image(voxels, AFFINE).to_filename(path)
    return path


@pytest.fixture
def root(tmp_path):
    """A small set in HipMRI's layout: float64 noise, of several shapes."""
    rng = np.random.default_rng(0)
    for case, (split, shapes) in enumerate(SHAPES.items()):
        (tmp_path / "set" / SPLIT_FOLDERS[split]).mkdir(parents=True)
        for number, shape in enumerate(shapes):
            name = f"case_{case:03d}_week_{case + 1}_slice_{number + 5}.nii.gz"
            write(tmp_path / "set" / SPLIT_FOLDERS[split] / name, rng.normal(500, 200, shape))
    return tmp_path / "set"


def prepare(root, **settings):
    """The builder, and the lines it logged; the data set lies in a folder beside the files."""
    lines = []
    config = DataConfig(**{"data": str(root), "tfds_dir": str(root.parent / "tfds")} | settings)
    return hip_mri.prepare(config, (16, 8), lines.append), lines


def records(builder):
    return [record for split in SPLITS for record in builder.as_data_source(split=split)]


def left_behind(root):
    """Files under tfds_dir, but for the lock."""
    return [path for path in (root.parent / "tfds").rglob("*") if path.is_file() and path.name != ".lock"]


def test_records_are_the_files_as_nibabel_reads_them(root):
    builder, _ = prepare(root)
    assert {split: builder.info.splits[split].num_examples for split in SHAPES} == {
        split: len(shapes) for split, shapes in SHAPES.items()
    }
    for split in SHAPES:
        for record in builder.as_data_source(split=split):
            name = record["file"].decode()
            image = nibabel.load(root / name)
            assert name.startswith(SPLIT_FOLDERS[split])
            assert record["image"].dtype == np.float32
            np.testing.assert_array_equal(record["image"], np.squeeze(image.get_fdata()).astype(np.float32))
            facts = (record["case"].decode(), record["week"], record["slice"])
            assert f"{facts[0]}_week_{facts[1]}_slice_{facts[2]}.nii.gz" == Path(name).name
            limits = np.percentile(image.get_fdata(), (0.5, 99.5))
            np.testing.assert_allclose(record["range"], limits, rtol=1e-6)
            if image.shape[0] > 1:
                np.testing.assert_allclose(record["affine"], AFFINE, rtol=1e-6)
    assert "tensorflow" not in sys.modules


def test_volumes_are_cut_along_slice_axis_and_scaled_as_a_whole(tmp_path):
    (tmp_path / "set").mkdir()
    voxels = np.arange(8 * 9 * 10, dtype=np.int16).reshape(8, 9, 10)
    for case in range(3):
        write(tmp_path / "set" / f"case{case}.nii", voxels)
    for axis, split in itertools.product([0, 1, -1], SPLITS):
        builder, _ = prepare(tmp_path / "set", slice_axis=axis)
        found = list(builder.as_data_source(split=split))
        assert [(record["week"], record["slice"]) for record in found] == [(-1, n) for n in range(voxels.shape[axis])]
        np.testing.assert_array_equal(np.stack([record["image"] for record in found], axis), voxels)
        assert len({record["range"].tobytes() for record in found}) == 1


def test_a_second_opening_reads_no_file_and_takes_no_lock(root, monkeypatch):
    first, lines = prepare(root)
    assert sum("Built" in line for line in lines) == 1
    monkeypatch.delattr(source.Source, "read")
    monkeypatch.delattr(hip_mri.fcntl, "flock")
    second, lines = prepare(root)
    assert not any("Built" in line for line in lines)
    for one, other in zip(records(first), records(second), strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])


def test_a_changed_source_or_setting_is_never_served_stale(root):
    prepare(root)
    path = next(root.rglob("case_000*slice_6*"))
    write(path, np.tile(np.float32([1, 2]), (16, 4)))
    changed = next(r for r in records(prepare(root)[0]) if r["file"].decode().endswith(path.name))
    np.testing.assert_array_equal(changed["image"], nibabel.load(path).get_fdata())
    other = next(r for r in records(prepare(root, scale_percentiles=(0, 50))[0]) if r["file"] == changed["file"])
    assert tuple(other["range"]) == (1, 1.5)


# Interrupted and simultaneous builds.


def in_another_process(root, *first):
    """Starts a process that runs the lines ``first`` and builds the data set."""
    lines = (
        "import resource, sys, time",
        "from vqvae_jax.config import DataConfig",
        "from vqvae_jax.data import hip_mri, source",
        *first,
        "hip_mri.prepare(DataConfig(data=sys.argv[1], tfds_dir=sys.argv[2]), (16, 8))",
    )
    command = [sys.executable, "-c", "\n".join(lines), root, root.parent / "tfds"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_build_leaves_nothing(root, monkeypatch):
    read = source.Source.read

    def stop_late(self, entry):
        if entry.split == "test":
            raise KeyboardInterrupt
        return read(self, entry)

    monkeypatch.setattr(source.Source, "read", stop_late)
    with pytest.raises(KeyboardInterrupt):
        prepare(root)
    assert not left_behind(root)
    monkeypatch.undo()
    assert len(records(prepare(root)[0])) == 6


def test_the_next_build_removes_what_a_killed_one_left(root):
    with in_another_process(
        root,
        "read = source.Source.read",
        "source.Source.read = lambda self, e: time.sleep(60) if e.split == 'test' else read(self, e)",
    ) as process:
        while not left_behind(root) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert left_behind(root)
    write(next(root.rglob("case_000*")), np.ones((16, 8), np.float32))  # the next build is of a changed set
    builder, _ = prepare(root)
    assert {path.parent for path in left_behind(root)} == {Path(builder.data_path)}


def test_a_second_builder_waits_for_the_first(root, monkeypatch):
    read, lines = source.Source.read, []

    def slowly(self, entry):
        time.sleep(0.1)
        return read(self, entry)

    monkeypatch.setattr(source.Source, "read", slowly)
    threads = [threading.Thread(target=lambda: lines.extend(prepare(root)[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("Data:" in line for line in lines) == 2
    assert sum("Built" in line for line in lines) == 1


def test_a_place_that_cannot_be_written_is_named(root):
    (root.parent / "tfds").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"--tfds-dir .*tfds: cannot be written .*; free space or choose another"):
        prepare(root)


def test_a_full_disk_is_named(root):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"  # writing beyond it fails, as on a full disk
    with in_another_process(root, limit) as process:
        assert re.search(r"DataError: --tfds-dir .*tfds: cannot be written .*; free space or", process.communicate()[1])
    assert not left_behind(root)


# Bad files.


def spoil(root, count=30):
    """Adds bad files to the set, as many in all as ``count``; returns their names."""
    folder = root / SPLIT_FOLDERS["train"]
    good = next(folder.iterdir()).read_bytes()
    (folder / "truncated.nii.gz").write_bytes(good[:-200])
    (folder / "flipped.nii.gz").write_bytes(good[:-6] + b"??" + good[-4:])
    (folder / "text.nii").write_text("not an image")
    (folder / "link.nii").symlink_to("nowhere.nii")
    write(folder / "small.nii", np.ones((6, 6), np.float32))
    write(root / SPLIT_FOLDERS["test"] / "four.nii", np.ones((16, 8, 2, 2), np.float32))
    write(root / SPLIT_FOLDERS["validation"] / "nan.nii", np.full((16, 8), np.nan, np.float32))
    for number in range(count - 7):
        (folder / f"empty{number}.nii").touch()
    return {path.relative_to(root).as_posix() for path in root.rglob("*.nii*") if not path.name.startswith("case")}


@pytest.mark.parametrize("packed", [False, True])
def test_all_bad_files_are_named_in_one_line(root, packed):
    bad = spoil(root)
    if packed:
        (root / SPLIT_FOLDERS["train"] / "link.nii").unlink()
        bad.remove(f"{SPLIT_FOLDERS['train']}/link.nii")
        with zipfile.ZipFile(root.parent / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in root.rglob("*.nii*"):
                archive.write(path, path.relative_to(root))
    with pytest.raises(DataError, match=r"--on-bad-file skip$") as caught:
        prepare(root.parent / "set.zip" if packed else root)
    message = str(caught.value)
    assert f"{len(bad)} of {len(bad) + 6} files cannot be used" in message
    assert {name for name in bad if f"{name} " in message} == bad
    assert "case_" not in message
    assert "\n" not in message
    assert not left_behind(root)


def test_skipped_files_are_listed_whenever_the_set_is_opened(root):
    expected = records(prepare(root)[0])
    bad = spoil(root)
    for _ in range(2):
        builder, lines = prepare(root, on_bad_file="skip")
        (warning,) = (line for line in lines if line.startswith("Warning:"))
        assert {name for name in bad if f"{name} " in warning} == bad
        for one, other in zip(records(builder), expected, strict=True):
            assert one["file"] == other["file"]
            np.testing.assert_array_equal(one["image"], other["image"])
    with pytest.raises(DataError, match="30 of 36 files"):
        prepare(root, on_bad_file="error")


@pytest.mark.parametrize("setting", ["error", "skip"])
@pytest.mark.parametrize("without", [["train"], ["validation"], ["test"], ["train", "validation", "test"]])
def test_a_split_without_a_readable_file_is_named_and_so_are_the_other_bad_files(root, setting, without):
    bad = spoil(root, 8)
    for path in (path for split in without for path in (root / SPLIT_FOLDERS[split]).glob("case*")):
        path.write_bytes(b"")
        bad.add(path.relative_to(root).as_posix())
    with pytest.raises(DataError, match=f"Mend or replace them: split {without[0]} holds no readable file$") as caught:
        prepare(root, on_bad_file=setting)
    assert {name for name in bad if f"{name} " in str(caught.value)} == bad
    assert not left_behind(root)


def test_a_constant_slice_is_kept_with_a_warning_and_becomes_zeros(root):
    write(root / SPLIT_FOLDERS["test"] / "flat.nii", np.full((16, 8), 37, np.int16))
    for _ in range(2):
        builder, lines = prepare(root)
        (warning,) = (line for line in lines if line.startswith("Warning:"))
        assert "1 constant file(s)" in warning
        assert warning.endswith(f"{SPLIT_FOLDERS['test']}/flat.nii")
    split = builder.as_data_source(split="test")
    flat = next(n for n, record in enumerate(split) if record["file"].endswith(b"flat.nii"))
    assert (split[flat]["image"] == 37).all()
    assert (loader.Slices(split, DataConfig(), (16, 8))[flat] == 0).all()


# Real scans.


@pytest.mark.skipif(not REAL_DATA.exists(), reason="shared/data is not here")
def test_the_real_zip(tmp_path):
    path = REAL_DATA / "prostatex_keras_slices_data.zip"
    builder, lines = prepare(path, tfds_dir=str(tmp_path))
    assert {split: builder.info.splits[split].num_examples for split in SPLITS} == {
        "train": 151,
        "validation": 20,
        "test": 68,
    }
    assert not any(line.startswith("Warning") for line in lines)
    with zipfile.ZipFile(path) as archive:
        for record in records(builder):
            content = archive.read(record["file"].decode())
            image = nibabel.Nifti1Image.from_bytes(gzip.decompress(content) if content[0] == 0x1F else content)
            np.testing.assert_array_equal(record["image"], np.squeeze(image.get_fdata()))
            np.testing.assert_allclose(record["affine"], image.affine)


@pytest.mark.skipif(not REAL_DATA.exists(), reason="shared/data is not here")
def test_the_real_volumes(tmp_path):
    builder, _ = prepare(REAL_DATA / "volumes", tfds_dir=str(tmp_path))
    stacks = {}
    for record in records(builder):
        stacks.setdefault(record["file"].decode(), []).append(record["image"])
    assert len(stacks) == 9
    for name, images in stacks.items():
        expected = nibabel.load(REAL_DATA / "volumes" / name).get_fdata()
        np.testing.assert_array_equal(np.stack(images, -1), expected)
