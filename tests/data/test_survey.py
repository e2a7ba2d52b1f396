"""What is found in a data set, and what is said of it: names and headers decide, doubts are warnings."""

import csv
import gzip
import shutil
import time
import zipfile

import nibabel
import numpy as np
import pytest

from vqvae_jax.config import DataConfig
from vqvae_jax.data.survey import MOST_LINES, Survey
from vqvae_jax.errors import DataError

RAS = np.diag([1.0, 1.0, 3.0, 1.0])


def write(path, shape=(16, 12), affine=RAS, voxels=None, code=1):
    """A NIfTI file of random intensities, or of the given voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if voxels is None:
        voxels = np.random.default_rng(len(str(path))).integers(0, 500, shape).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nibabel.save(image, path)
    return path


def survey(path, **settings):
    options = {name: settings.pop(name) for name in ("divide",) if name in settings}
    return Survey(path, DataConfig(**settings), **options)


def found(result):
    """Split of each image, by name."""
    return {image.name: image.split for image in result.images}


def warned(result, *words):
    """Whether one warning has all the words."""
    return any(all(word in text for word in words) for text in result.warnings)


def nnunet(root):
    for index in range(4):
        write(root / f"Task05/imagesTr/prostate_{index:02}.nii.gz", (16, 16, 4))
        write(root / f"Task05/labelsTr/prostate_{index:02}.nii.gz", (16, 16, 4))
    write(root / "Task05/imagesTs/prostate_90.nii.gz", (16, 16, 4))


def test_nnunets_labels_are_left_out_and_validation_is_made(tmp_path):
    nnunet(tmp_path)
    result = survey(tmp_path)
    splits = found(result)
    assert len(splits) == 5
    assert all("labels" not in name for name in splits)
    assert sorted(splits.values()) == ["test", "train", "train", "train", "validation"]
    assert "validation made from train" in result.how
    assert any("4 label map" in line for line in result.facts())


def test_split_folders_are_found_below_two_folders(tmp_path):
    for split in ("train", "validate", "test"):
        write(tmp_path / "a/HipMRI/x" / f"keras_slices_{split}" / f"case_{split}1_week_0_slice_0.nii.gz")
    result = survey(tmp_path)
    assert sorted(found(result).values()) == ["test", "train", "validation"]
    assert result.how == "its own folders"


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("imagesTr", "imagesVal", "imagesTs")]
)
def test_usual_names_of_splits(tmp_path, names):
    for name in names:
        write(tmp_path / name / f"p_{name}1.nii")
    assert sorted(found(survey(tmp_path)).values()) == ["test", "train", "validation"]


def test_one_split_given_the_others_are_made_by_case(tmp_path):
    for case in range(30):
        for index in range(2):
            write(tmp_path / "train" / f"case_{case}_week_0_slice_{index}.nii")
    result = survey(tmp_path)
    assert set(found(result).values()) == {"train", "validation", "test"}
    cases = {split: {i.case for i in result.images if i.split == split} for split in ("train", "validation", "test")}
    assert not cases["train"] & (cases["validation"] | cases["test"])
    assert "validation and test made from train" in result.how


def test_a_case_in_two_given_splits_is_a_warning_with_its_name(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path / split / f"case_007_week_{len(split)}_slice_0.nii")
    assert warned(survey(tmp_path), "several splits", "case_007", "--case-pattern")


def test_files_outside_the_splits_folders_are_said_to_be_left_out(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path / split / f"p{split}1.nii")
    write(tmp_path / "extra/p9.nii")
    result = survey(tmp_path)
    assert "extra/p9.nii" not in found(result)
    assert warned(result, "outside", "extra/p9.nii", "--data FILE.csv")


def test_a_few_whole_numbers_look_like_a_label_map(tmp_path):
    labels = np.random.default_rng(0).integers(0, 4, (16, 16)).astype(np.uint8)
    for index in range(4):
        write(tmp_path / f"p{index}.nii.gz", voxels=labels)
    assert warned(survey(tmp_path), "label maps", "p0.nii.gz", "--data FILE.csv")


def test_one_four_dimensional_file_is_found_from_headers(tmp_path):
    for index in range(5):
        write(tmp_path / f"p{index}.nii.gz", (8, 8, 3))
    write(tmp_path / "p9.nii.gz", (8, 8, 3, 2))
    result = survey(tmp_path)
    assert [name for name, _ in result.unreadable] == ["p9.nii.gz"]
    assert "4-D" in result.unreadable[0][1]


def test_odd_names_pairs_and_archives_are_named_with_advice(tmp_path):
    for index in range(3):
        write(tmp_path / f"p{index}.nii.gz")
    shutil.copy(tmp_path / "p0.nii.gz", tmp_path / "p0.nii (1).gz")
    (tmp_path / "q.hdr").write_bytes(b"x")
    (tmp_path / "q.img").write_bytes(b"x")
    (tmp_path / "more.zip").write_bytes(b"x")
    result = survey(tmp_path)
    assert warned(result, "4 files are left out", "rename", "convert", "unpack")
    assert len(result.images) == 3


def test_upper_case_endings_are_read(tmp_path):
    for index in range(3):
        path = write(tmp_path / f"p{index}.nii.gz")
        path.rename(tmp_path / f"P{index}.NII.GZ")
    result = survey(tmp_path)
    assert len(result.images) == 3
    assert result.read(result.images[0]).voxels.shape == (16, 12)


def test_an_image_beside_its_zipped_twin_is_one_warning(tmp_path):
    for index in range(3):
        write(tmp_path / f"p{index}.nii.gz")
    write(tmp_path / "p0.nii")
    result = survey(tmp_path)
    assert sorted(found(result)) == ["p0.nii.gz", "p1.nii.gz", "p2.nii.gz"]
    assert warned(result, "1 files lie beside", "p0.nii")


def test_linked_folders_are_followed(tmp_path):
    for index in range(3):
        write(tmp_path / "real" / f"p{index}.nii.gz")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path / "real")
    (tmp_path / "set/link/circle").symlink_to(tmp_path / "set")
    assert len(survey(tmp_path / "set").images) == 3


def test_a_zip_with_backslashes_has_the_cases_of_one_with_slashes(tmp_path):
    for separator in "/\\":
        with zipfile.ZipFile(tmp_path / f"{ord(separator)}.zip", "w") as archive:
            for index in range(3):
                path = write(tmp_path / "x" / f"{index}.nii")
                archive.write(path, f"set{separator}patient{index}{separator}T1.nii")
    slashes, backslashes = (survey(tmp_path / f"{ord(separator)}.zip") for separator in "/\\")
    assert (
        {i.case for i in slashes.images} == {"patient0", "patient1", "patient2"} == {i.case for i in backslashes.images}
    )
    assert backslashes.read(backslashes.images[0]).voxels.size == 16 * 12


def test_a_deflate64_member_says_to_unpack_the_zip(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(3):
            archive.write(write(tmp_path / "x" / f"p{index}.nii"), f"p{index}.nii")
    content = path.read_bytes()
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    content = bytearray(content)
    content[local + 8] = content[central + 10] = 9
    path.write_bytes(content)
    result = survey(path)
    assert "Deflate64" in result.unreadable[0][1]
    assert "unpack" in result.unreadable[0][1]


def test_one_file_as_data_says_to_give_its_folder(tmp_path):
    path = write(tmp_path / "p1.nii.gz")
    with pytest.raises(DataError, match="give the folder"):
        survey(path)


def test_only_label_maps_say_what_was_left_out_and_how_to_settle_it(tmp_path):
    write(tmp_path / "labels/p1.nii.gz")
    with pytest.raises(DataError, match=r"1 left out \(label map\).*--write FILE.csv"):
        survey(tmp_path)


def test_volumes_are_cut_along_the_odd_spacing_and_the_direction_is_known(tmp_path):
    for index in range(3):
        write(tmp_path / f"p{index}.nii.gz", (4, 16, 16), np.diag([5.0, 1, 1, 1]))
    result = survey(tmp_path)
    assert {image.cut.axis for image in result.images} == {0}
    assert result.direction == "left-right"
    assert result.slices("train") == 4


def test_several_directions_are_a_warning_and_a_flag_settles_it(tmp_path):
    write(tmp_path / "p0.nii.gz", (4, 16, 16), np.diag([5.0, 1, 1, 1]))
    for index in (1, 2):
        write(tmp_path / f"p{index}.nii.gz", (16, 16, 4), np.diag([1.0, 1, 5, 1]))
    result = survey(tmp_path)
    assert warned(result, "several directions", "left-right", "head-foot", "--slice-direction")
    assert result.direction is None
    settled = survey(tmp_path, slice_direction="head-foot")
    assert settled.direction == "head-foot"
    assert {image.cut.axis for image in settled.images} == {2}


def test_equal_spacing_is_a_doubt(tmp_path):
    for index in range(3):
        write(tmp_path / f"p{index}.nii.gz", (8, 8, 8), np.eye(4))
    result = survey(tmp_path)
    assert warned(result, "guess", "--slice-axis")
    assert not warned(survey(tmp_path, slice_axis=1), "guess")


def test_slices_that_are_each_a_case_are_a_doubt(tmp_path):
    for index in range(5):
        write(tmp_path / f"img{index}.nii.gz")
    assert warned(survey(tmp_path), "one patient may lie in two splits", "--case-pattern")


def test_slices_larger_than_the_model_are_a_warning(tmp_path):
    for index in range(3):
        write(tmp_path / f"p{index}.nii.gz", (40, 12))
    result = survey(tmp_path)
    result.check_fit((32, 16))
    assert warned(result, "larger than the model's 32 x 16", "--fit resize")
    resized = survey(tmp_path, fit="resize")
    resized.check_fit((32, 16))
    assert not warned(resized, "larger")


def test_the_table_is_read_back_and_what_people_changed_counts(tmp_path):
    nnunet(tmp_path / "set")
    first = survey(tmp_path / "set")
    first.write(tmp_path / "files.csv")
    again = survey(tmp_path / "files.csv")
    assert {i.name.split("/")[-1]: (i.case, i.split) for i in again.images} == {
        i.name.split("/")[-1]: (i.case, i.split) for i in first.images
    }
    with (tmp_path / "files.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    rows[0] |= {"role": "left out"}
    label = next(row for row in rows if row["role"] == "label map")
    label |= {"role": "image", "split": "test", "case": "me"}
    with (tmp_path / "files.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    changed = survey(tmp_path / "files.csv")
    assert {(i.case, i.split) for i in changed.images if "labels" in i.name} == {("me", "test")}
    assert rows[0]["path"] not in found(changed)


def test_a_table_of_a_zip_is_read_through_the_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for index in range(3):
            archive.write(write(tmp_path / "x" / f"p{index}.nii"), f"a/p{index}.nii")
    survey(tmp_path / "set.zip").write(tmp_path / "files.csv")
    result = survey(tmp_path / "files.csv")
    assert [image.name for image in result.images] == [f"set.zip/a/p{index}.nii" for index in range(3)]
    assert result.read(result.images[2]).voxels.shape == (16, 12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,role\na,b\n", "no column"),
        ("path,role,case,split,reason\np0.nii.gz,picture,,,\n", "role"),
        ("path,role,case,split,reason\np0.nii.gz,image,,training,\n", "split"),
        ("path,role,case,split,reason\nabsent.nii,image,,,\n", "not there"),
        ("path,role,case,split,reason\np0.nii.gz,image,,,\np0.nii.gz,image,,,\n", "twice"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(tmp_path, text, words):
    write(tmp_path / "p0.nii.gz")
    (tmp_path / "files.csv").write_text(text)
    with pytest.raises(DataError, match=words) as refused:
        survey(tmp_path / "files.csv")
    assert "\n" not in str(refused.value)


def test_the_fingerprint_is_of_the_content_not_of_place_or_time(tmp_path):
    for index in range(4):
        write(tmp_path / "a" / f"p{index}.nii.gz", (16, 12, 3))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/p0.nii.gz").touch()
    first = survey(tmp_path / "a").fingerprint()
    assert survey(tmp_path / "b").fingerprint() == first
    content = bytearray(gzip.decompress((tmp_path / "b/p0.nii.gz").read_bytes()))
    content[-1] ^= 1
    (tmp_path / "b/p0.nii.gz").write_bytes(gzip.compress(bytes(content)))
    assert survey(tmp_path / "b").fingerprint() != first
    assert survey(tmp_path / "a", slice_axis=0).fingerprint() != first


def test_the_summary_keeps_to_its_lines_with_warnings_first(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "Task05/imagesTr/q.hdr").write_bytes(b"x")
    write(tmp_path / "Task05/x.nii")
    write(tmp_path / "Task05/imagesTr/p_mask.nii")
    lines = survey(tmp_path).summary()
    assert len(lines) <= MOST_LINES
    kinds = [line.startswith("Warning: ") for line in lines]
    assert kinds == sorted(kinds, reverse=True)
    assert sum(kinds) >= 3


def test_a_set_that_is_not_divided_may_be_of_one_patient(tmp_path):
    write(tmp_path / "p1.nii.gz", (16, 16, 3))
    assert set(found(survey(tmp_path, divide=False)).values()) == {"whole"}
    with pytest.raises(DataError, match="1 case"):
        survey(tmp_path)


@pytest.mark.slow
def test_ten_thousand_headers_take_seconds(tmp_path):
    source = write(tmp_path / "one.nii.gz", (64, 64))
    for index in range(10_000):
        folder = tmp_path / "set" / f"p{index // 100}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"s{index}.nii.gz").hardlink_to(source)
    begin = time.process_time()
    assert len(survey(tmp_path / "set").images) == 10_000
    assert time.process_time() - begin < 60  # a file of 100 MB each would take hours
