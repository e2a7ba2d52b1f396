"""Building the data set: records true to the files, built once and whole or not at all, every bad file named."""

import gzip
import itertools
import os
import re
import shutil
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
from conftest import REAL_DATA

from vqvae_jax.config import DataConfig
from vqvae_jax.data import hip_mri, loader, survey
from vqvae_jax.data.splits import SPLIT_FOLDERS, SPLITS
from vqvae_jax.errors import DataError

PROSTATEX = REAL_DATA / "prostatex"
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
    return hip_mri.build(hip_mri.look(config, (16, 8)), config, lines.append), lines


def records(builder):
    return [record for split in SPLITS for record in builder.as_data_source(split=split)]


def left_behind(root):
    """Files under tfds_dir, but for the locks."""
    return [p for p in (root.parent / "tfds").rglob("*") if p.is_file() and p.name not in (".lock", ".used")]


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


def test_a_second_opening_reads_no_voxels(root, monkeypatch):
    first, lines = prepare(root)
    assert sum("Built" in line for line in lines) == 1
    monkeypatch.delattr(survey.Survey, "read")
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
        "from vqvae_jax.data import hip_mri, survey",
        *first,
        "config = DataConfig(data=sys.argv[1], tfds_dir=sys.argv[2])",
        "hip_mri.build(hip_mri.look(config, (16, 8)), config)",
    )
    command = [sys.executable, "-c", "\n".join(lines), root, root.parent / "tfds"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_build_leaves_nothing(root, monkeypatch):
    read = survey.Survey.read

    def stop_late(self, image):
        if image.split == "test":
            raise KeyboardInterrupt
        return read(self, image)

    monkeypatch.setattr(survey.Survey, "read", stop_late)
    with pytest.raises(KeyboardInterrupt):
        prepare(root)
    assert not left_behind(root)
    monkeypatch.undo()
    assert len(records(prepare(root)[0])) == 6


def test_the_next_build_removes_what_a_killed_one_left(root):
    with in_another_process(
        root,
        "read = survey.Survey.read",
        "survey.Survey.read = lambda self, e: time.sleep(60) if e.split == 'test' else read(self, e)",
    ) as process:
        while not left_behind(root) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert left_behind(root)
    write(next(root.rglob("case_000*")), np.ones((16, 8), np.float32))  # the next build is of a changed set
    builder, _ = prepare(root)
    assert {path.parent for path in left_behind(root)} == {Path(builder.data_path)}


def test_a_second_builder_waits_for_the_first(root, monkeypatch):
    read, lines = survey.Survey.read, []

    def slowly(self, image):
        time.sleep(0.1)
        return read(self, image)

    monkeypatch.setattr(survey.Survey, "read", slowly)
    threads = [threading.Thread(target=lambda: lines.extend(prepare(root)[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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


# Reuse, and the limit.


def key(root, **settings):
    config = DataConfig(**settings)
    return hip_mri.build_key(survey.Survey(root, config), config)


def test_a_copied_or_touched_set_is_not_built_again(root, tmp_path):
    before = key(root)
    copy = shutil.copytree(root, tmp_path / "elsewhere/copy")
    for path in copy.rglob("*.nii.gz"):
        os.utime(path, ns=(0, 0))
    assert key(copy) == before
    assert sum("Built" in line for line in prepare(root)[1]) == 1
    assert not any("Built" in line for line in prepare(copy, tfds_dir=str(tmp_path / "tfds"))[1])
    path = next(copy.rglob("case_000*slice_6*"))
    image = nibabel.load(path)
    voxels = image.get_fdata()
    voxels[3, 4] += 1
    write(path, voxels)
    assert key(copy) != before
    assert key(root, nan="zero") != before
    assert key(root, scale_percentiles=(0, 50)) != before


def built(folder, name, size, used):
    """A stand-in for a built data set, last used at a time."""
    place = folder / name / "1.0.0"
    place.mkdir(parents=True)
    (place / "records").write_bytes(b"x" * size)
    (folder / name / hip_mri._USED).touch()
    os.utime(folder / name / hip_mri._USED, (used, used))
    return folder / name


def test_the_sets_not_used_for_longest_are_removed_until_the_limit_is_kept(tmp_path):
    for name, used in (("b", 20), ("a", 30), ("c", 10), ("d", 40)):
        built(tmp_path, name, 1000, used)
    assert list(hip_mri._remove_old(tmp_path, 4000)) == []
    assert list(hip_mri._remove_old(tmp_path, 2500)) == ["c", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]
    assert list(hip_mri._remove_old(tmp_path, 0)) == ["a", "d"]


def test_a_set_in_use_by_another_process_is_kept(tmp_path):
    for name, used in (("a", 10), ("b", 20), ("c", 30)):
        built(tmp_path, name, 1000, used)
    lines = (
        "import sys; from pathlib import Path; from vqvae_jax.data import hip_mri",
        "hip_mri._use(Path(sys.argv[1])); print('in use', flush=True); sys.stdin.read()",
    )
    command = [sys.executable, "-c", "\n".join(lines), tmp_path / "a/1.0.0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in use\n"
        os.utime(tmp_path / "a" / hip_mri._USED, (10, 10))
        assert list(hip_mri._remove_old(tmp_path, 1000)) == ["b", "c"]
        assert (tmp_path / "a/1.0.0/records").exists()
        process.kill()
    assert list(hip_mri._remove_old(tmp_path, 0)) == ["a"]


def test_using_a_set_makes_it_the_last_to_be_removed_and_the_limit_is_a_setting(root):
    paths = [Path(prepare(root, scale_percentiles=(0, percent))[0].data_path) for percent in (50, 60)]
    used = [path.parent / hip_mri._USED for path in paths]
    os.utime(used[1], (10, 10))
    before = used[0].stat().st_mtime_ns
    assert used[1].stat().st_mtime_ns < before
    prepare(root, scale_percentiles=(0, 60))
    assert used[1].stat().st_mtime_ns >= before
    while hip_mri._in_use:  # as when this process has ended
        os.close(hip_mri._in_use.pop())
    _, lines = prepare(root, scale_percentiles=(0, 70), cache_limit=0)
    assert sum(line.startswith("Removed the data set") for line in lines) == 2
    assert not any(path.exists() for path in paths)
    assert left_behind(root)  # the one that was asked for


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


VOXELS_ALONE_TELL = ("truncated.nii.gz", "flipped.nii.gz", "nan.nii")
"""Of the bad files, those whose headers are in order."""


@pytest.mark.parametrize("packed", [False, True])
def test_all_bad_files_are_named_in_one_line(root, packed):
    """First those whose headers tell, before any voxel is read; then the others."""
    bad = spoil(root)
    if packed:
        (root / SPLIT_FOLDERS["train"] / "link.nii").unlink()
        bad.remove(f"{SPLIT_FOLDERS['train']}/link.nii")
    late = {name for name in bad if name.endswith(VOXELS_ALONE_TELL)}
    for named in (bad - late, late):
        if packed:
            with zipfile.ZipFile(root.parent / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for path in root.rglob("*.nii*"):
                    archive.write(path, path.relative_to(root))
        with pytest.raises(DataError, match=r"--on-bad-file skip$") as caught:
            prepare(root.parent / "set.zip" if packed else root)
        message = str(caught.value)
        left = len(list(root.rglob("*.nii*")))
        assert f"{len(named)} of {left} files cannot be used" in message
        assert {name for name in bad if f"{name} " in message} == named
        assert "case_" not in message
        assert "\n" not in message
        assert not left_behind(root)
        for name in named:
            (root / name).unlink()
    assert len(records(prepare(root)[0])) == 6


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
    with pytest.raises(DataError, match="27 of 36 files"):
        prepare(root, on_bad_file="error")


@pytest.mark.parametrize("setting", ["error", "skip"])
@pytest.mark.parametrize("without", [["train"], ["validation"], ["test"], ["train", "validation", "test"]])
def test_a_split_without_a_readable_file_is_named_and_so_are_the_other_bad_files(root, setting, without):
    bad = spoil(root, 8)
    bad = {name for name in bad if not name.endswith(VOXELS_ALONE_TELL)}
    for path in [path for split in without for path in (root / SPLIT_FOLDERS[split]).iterdir()]:
        path.unlink()
        path.write_bytes(b"")
        bad.add(path.relative_to(root).as_posix())
    with pytest.raises(DataError, match=r"Mend or replace them: split \w+ holds no readable file$") as caught:
        prepare(root, on_bad_file=setting)
    assert re.search(r"split (\w+) holds", str(caught.value))[1] in without
    assert {name for name in bad if f"{name} " in str(caught.value)} == bad
    assert not left_behind(root)


def test_a_split_whose_voxels_cannot_be_read_is_named(root):
    for path in (root / SPLIT_FOLDERS["validation"]).iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    for setting in ("error", "skip"):
        with pytest.raises(DataError, match=r"Mend or replace them: split validation holds no readable file$"):
            prepare(root, on_bad_file=setting)
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


@pytest.mark.skipif(not PROSTATEX.exists(), reason="shared/data is not here")
def test_the_real_zip(tmp_path):
    path = PROSTATEX / "prostatex_keras_slices_data.zip"
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


@pytest.mark.skipif(not PROSTATEX.exists(), reason="shared/data is not here")
def test_the_real_volumes(tmp_path):
    builder, _ = prepare(PROSTATEX / "volumes", tfds_dir=str(tmp_path))
    stacks = {}
    for record in records(builder):
        stacks.setdefault(record["file"].decode(), []).append(record["image"])
    assert len(stacks) == 9
    for name, images in stacks.items():
        expected = nibabel.load(PROSTATEX / "volumes" / name).get_fdata()
        np.testing.assert_array_equal(np.stack(images, -1), expected)
