"""Listing the files of a set: zips and folders, also those that are not what they should be."""

import os
import stat
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from vqvae_jax.config import DataConfig
from vqvae_jax.data import listing
from vqvae_jax.data.splits import week_and_slice
from vqvae_jax.data.survey import Survey, find_data
from vqvae_jax.errors import ConfigError, DataError

NIFTI = nibabel.Nifti1Image(np.arange(72, dtype=np.int16).reshape(9, 8), np.eye(4)).to_bytes()
HIPMRI = {
    "keras_slices_train/case_004_week_0_slice_10.nii": "train",
    "keras_slices_train/case_004_week_0_slice_2.nii": "train",
    "keras_slices_validate/case_005_week_1_slice_0.nii": "validation",
    "keras_slices_test/case_006_week_12_slice_3.nii": "test",
}
NEVER_READ = (
    "keras_slices_seg_train/seg_004_week_0_slice_10.nii",
    "keras_slices_train/readme.txt",
    "keras_slices_train/._case_004_week_0_slice_2.nii",
    "__MACOSX/keras_slices_train/case_004_week_0_slice_2.nii",
)


def write_folder(root, names, content=NIFTI):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path, names, content=NIFTI):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name) if isinstance(name, str) else name, content)
    return path


def survey(path, **settings):
    return Survey(path, DataConfig(**settings))


def splits(found):
    return {image.name: image.split for image in found.images}


@pytest.mark.parametrize("nested", ["", "HipMRI_study_keras_slices_data/"])
@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_the_hipmri_layout_keeps_its_splits(write, nested, tmp_path):
    found = survey(write(tmp_path / "set", [nested + name for name in (*HIPMRI, *NEVER_READ)]))
    assert splits(found) == {nested + name: split for name, split in HIPMRI.items()}
    assert found.how == "its own folders"
    (test,) = (image for image in found.images if image.split == "test")
    assert (test.case, week_and_slice(test.name)) == ("case_006", (12, 3))
    assert [week_and_slice(image.name)[1] for image in found.images if image.split == "train"] == [2, 10]
    for image in found.images:
        np.testing.assert_array_equal(found.read(image).voxels, np.arange(72).reshape(9, 8))


def test_a_zip_with_backslashes_is_understood(tmp_path):
    names = [name.replace("/", "\\") for name in ("set/" + name for name in (*HIPMRI, *NEVER_READ))]
    found = survey(write_zip(tmp_path / "set.zip", names))
    assert sorted(splits(found).values()) == sorted(HIPMRI.values())
    assert found.read(found.images[0]).voxels.shape == (9, 8)


@pytest.mark.parametrize("name", ["a1.nii", "a1.NII.GZ", "a1.hdr", "a1.img"])
def test_one_file_as_data_says_to_give_its_folder(name, tmp_path):
    write_folder(tmp_path, [name])
    with pytest.raises(DataError, match=rf"--data .*{name}: is one NIfTI file; give the folder"):
        survey(tmp_path / name)


def test_the_default_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("data/HipMRI_study_keras_slices_data")
    with pytest.raises(DataError, match=rf"{folder}.*--preset demo"):
        find_data(None)
    archive = write_folder(tmp_path, [f"{folder}.zip"]) / f"{folder}.zip"
    assert find_data(None) == archive.relative_to(tmp_path)
    folder.mkdir()
    assert find_data(None) == folder
    with pytest.raises(DataError, match=r"--data elsewhere: no such .*--preset demo"):
        find_data("elsewhere")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], ".nii or .nii.gz files; "),
        (["notes.txt"], ".nii or .nii.gz files; "),
        (
            ["keras_slices_seg_train/a.nii", "._a.nii"],
            r"images: 1 left out \(hidden\), 1 left out \(label map\); .*--write",
        ),
    ],
)
def test_a_set_without_images_says_what_is_wanted(names, reason, tmp_path):
    with pytest.raises(DataError, match=rf"holds no {reason}.*put .*--preset demo"):
        survey(write_folder(tmp_path, names))


def test_two_cases_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match=r"belong to 2 case\(s\) \(a1, b1\).*--case-pattern"):
        survey(write_folder(tmp_path, ["a1_x.nii", "a1_y.nii", "b1.nii"]))


def test_a_case_pattern_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="--case-pattern '\\(' is not a regular expression"):
        survey(tmp_path, case_pattern="(")


# Zips that are not to be trusted.


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("odd", ["../a.nii", "keras_slices_train/../../a.nii", "/etc/a.nii", "C:/a.nii", "..\\a.nii"])
def test_members_outside_the_zips_folder_are_refused(odd, tmp_path):
    with pytest.raises(DataError, match="points outside the zip's own folder; repack") as caught:
        survey(write_zip(tmp_path / "set.zip", [*HIPMRI, odd]))
    assert repr(odd) in str(caught.value)


def test_links_in_a_zip_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"member 'keras_slices_train/l.nii' is a symbolic link; repack"):
        survey(write_zip(tmp_path / "set.zip", [*HIPMRI, link("keras_slices_train/l.nii")]))


def test_a_zip_may_announce_no_more_than_the_limit(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "set.zip", HIPMRI)
    monkeypatch.setattr(listing, "MAX_UNZIPPED_BYTES", len(NIFTI) * len(HIPMRI))
    survey(path)
    monkeypatch.setattr(listing, "MAX_UNZIPPED_BYTES", len(NIFTI) * len(HIPMRI) - 1)
    with pytest.raises(DataError, match=r"set.zip: announces more than"):
        survey(path)


def damaged_version(content):
    start = content.index(b"PK\x01\x02")
    return content[: start + 6] + b"\xff" + content[start + 7 :]


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: NIFTI, damaged_version])
def test_what_is_no_zip_is_named(damage, tmp_path):
    path = write_zip(tmp_path / "set.zip", HIPMRI)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"set.zip: not a folder and not a readable zip .*; download it again"):
        survey(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_is_named(compression, tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in HIPMRI:
            archive.writestr(name, NIFTI)
    content, first = path.read_bytes(), next(iter(HIPMRI))
    start = content.index(first.encode()) + len(first)
    for position in range(start + 9, start + 24):  # 9: the bytes of an LZMA header that may vary
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        message = refusal(survey(path), first)
        assert message.startswith(f"{first} ")
        assert "\n" not in message


def refusal(found, name):
    """How a file is refused: by its header, or when it is read."""
    for odd, reason in found.unreadable:
        if odd == name:
            return f"{odd} {reason}"
    with pytest.raises(DataError) as caught:
        found.read(next(image for image in found.images if image.name == name))
    return str(caught.value)


# Folders that are not to be trusted.


def test_a_broken_link_is_listed_and_named(tmp_path):
    write_folder(tmp_path, HIPMRI)
    (tmp_path / "keras_slices_train/a.nii").symlink_to("nowhere.nii")
    found = survey(tmp_path)
    assert found.unreadable == [("keras_slices_train/a.nii", "cannot be opened (No such file or directory)")]
    assert len(found.images) == len(HIPMRI)
    assert any("keras_slices_train/a.nii" in warning and "--on-bad-file" in warning for warning in found.warnings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_named(tmp_path):
    write_folder(tmp_path, HIPMRI)
    first = next(iter(HIPMRI))
    (tmp_path / first).chmod(0)
    assert survey(tmp_path).unreadable == [(first, "cannot be opened (Permission denied)")]


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, HIPMRI)
    first, opened = next(iter(HIPMRI)), Path.open

    def refuse(path, *arguments):  # chmod would not stop root
        if path.as_posix().endswith(first):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    assert survey(tmp_path).unreadable == [(first, "cannot be opened (Permission denied)")]


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    write_folder(tmp_path, HIPMRI)
    os.mkfifo(tmp_path / "keras_slices_train/a.nii")
    assert survey(tmp_path).unreadable == [("keras_slices_train/a.nii", "is a pipe; expected a file")]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "elsewhere", ["c3.nii"])
    root = write_folder(tmp_path / "set", ["a1.nii", "deep/b2.nii"])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "deep/up").symlink_to(root)
    (root / "deep/here").symlink_to(".")
    assert set(splits(survey(root))) == {"a1.nii", "deep/b2.nii", "linked/c3.nii"}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, HIPMRI)
    scandir = os.scandir

    def refuse(path):  # chmod would not stop root
        if str(path).endswith("keras_slices_test"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"keras_slices_test: cannot be listed \(Permission denied\); make it readable"):
        survey(tmp_path)


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    write_folder(tmp_path, ["a1.nii", "b2.nii", os.fsdecode(b"caf\xe9.nii")])
    with pytest.raises(DataError, match=r"the file name 'caf\\udce9.nii' is not UTF-8; rename it"):
        survey(tmp_path)


# The order, and the fingerprint.


def test_the_order_of_files_does_not_depend_on_the_file_system(tmp_path):
    names = [
        f"keras_slices_{split}/case_{n}_week_0_slice_1²3.nii"
        for split in ("train", "validate", "test")
        for n in ["1", "01", "2"]
    ]
    one, other = (survey(write_zip(tmp_path / f"{way}.zip", names[::way])) for way in (1, -1))
    assert [image.name for image in one.images] == [image.name for image in other.images]
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(NIFTI[:-1] + b"?"),
        lambda path: path.write_bytes(NIFTI + b" "),
        lambda path: path.unlink(),
        lambda path: path.with_name("case_009_week_0_slice_0.nii").write_bytes(NIFTI),
        lambda path: path.rename(path.parents[1] / "keras_slices_test" / path.name),
    ],
    ids=["changed", "resized", "removed", "added", "moved to another split"],
)
def test_the_fingerprint_changes_with_the_files_alone(change, tmp_path):
    write_folder(tmp_path, HIPMRI)
    before = survey(tmp_path).fingerprint()
    write_folder(tmp_path, ["keras_slices_seg_train/new.nii"])
    path = tmp_path / next(iter(HIPMRI))
    os.utime(path, ns=(0, 0))
    assert survey(tmp_path).fingerprint() == before
    change(path)
    assert survey(tmp_path).fingerprint() != before
