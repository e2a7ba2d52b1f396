"""The order of training batches, its parts, its position; evaluation batches that cover a split exactly."""

import itertools
import json
import time

import nibabel
import numpy as np
import pytest

from vqvae_jax.config import DataConfig
from vqvae_jax.data import grid, hip_mri, loader
from vqvae_jax.data.loader import Slices, TrainLoader, eval_batches, open_splits
from vqvae_jax.errors import DataError

SIZE = (16, 8)


class Records(list):
    """Stands for a TFDS data source; record i's slice is constant (i + 1) / 100 once scaled. Notes what is read."""

    def __init__(self, count, shape=SIZE):
        self.read = []
        affine = np.diag([2.0, 3.0, 4.0, 1.0])
        super().__init__(
            {
                "image": np.full(shape, n + 1, np.float32),
                "range": np.array([0, 100], np.float32),
                "affine": affine,
                "file": f"{n}.nii".encode(),
                "case": f"case_{n // 2}".encode(),
                "slice": np.int32(n),
            }
            for n in range(count)
        )

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def slices(count, **settings):
    return Slices(Records(count), DataConfig(**settings), SIZE)


def order(stream, batches):
    """Indices of the slices in the next batches, [batches, B]."""
    drawn = np.stack(list(itertools.islice(stream, batches)))
    return np.rint(drawn[:, :, 0, 0, 0] * 100).astype(int) - 1


def test_batches_are_stacked_slices():
    (batch,) = itertools.islice(TrainLoader(slices(10), 4, 0), 1)
    assert batch.dtype == np.float32
    assert batch.shape == (4, *SIZE, 1)
    assert (batch == batch[:, :1, :1]).all()


@pytest.mark.parametrize("room", [0, 6 * 16 * 8 * 4 - 1, 6 * 16 * 8 * 4])
def test_slices_are_scaled_and_fitted_whether_kept_or_not(room, monkeypatch):
    monkeypatch.setattr(loader, "_kept_bytes", lambda: room)
    records = Records(6, (20, 6))
    prepared = Slices(records, DataConfig(), SIZE)
    for _ in range(2):
        for n in range(6):
            expected = grid.fit(np.full((20, 6), (n + 1) / 100, np.float32), SIZE, "pad-crop")
            np.testing.assert_allclose(prepared[n][..., 0], expected)
    assert len(records.read) == (6 if room == 6 * 16 * 8 * 4 else 12)


def test_slices_take_at_most_a_quarter_of_the_memory():
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0.2 * total < loader._kept_bytes() < 0.3 * total


def test_a_sample_is_on_its_own_grid_with_its_origin():
    split = Slices(Records(6, (20, 6)), DataConfig(), SIZE)
    sample = split.sample(5)
    np.testing.assert_array_equal(sample.intensities, np.full((20, 6), 6))
    np.testing.assert_allclose(sample.pixels, np.full((20, 6), 0.06))
    assert (sample.index, sample.file, sample.case, sample.slice) == (5, "5.nii", "case_2", 5)
    assert sample.range == (0, 100)
    np.testing.assert_array_equal(sample.affine, np.diag([2, 3, 4, 1]))


# Training: the order.


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_seed_alone_fixes_the_order(seed):
    one, other = (order(TrainLoader(slices(23), 4, seed), 15) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert (one != order(TrainLoader(slices(23), 4, seed + 1), 15)).any()


@pytest.mark.parametrize(("count", "batch"), [(24, 4), (23, 4), (4, 4), (7, 1)])
def test_each_epoch_visits_distinct_slices_in_another_order(count, batch):
    stream = TrainLoader(slices(count), batch, 0)
    assert stream.steps_per_epoch == stream.batches_per_epoch == count // batch
    epochs = order(stream, 12 * stream.steps_per_epoch).reshape(12, -1)
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
    assert len({tuple(epoch) for epoch in epochs}) >= 10  # of 4 slices there are only 24 orders
    assert set(epochs.flat) == set(range(count))  # what one epoch leaves over, another visits


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("count", [24, 29])
def test_the_processes_parts_are_the_single_processs_batch(processes, count):
    whole = order(TrainLoader(slices(count), 6, 5), 15)
    parts = [
        order(TrainLoader(slices(count), 6, 5, process_index=index, process_count=processes), 15)
        for index in range(processes)
    ]
    assert all(part.shape == (15, 6 // processes) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts, axis=1)), np.sort(whole))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_batch_are_the_batch(parts, processes):
    whole = order(TrainLoader(slices(30), 12, 5), 6).reshape(6, parts, -1)
    shares = []
    for index in range(processes):
        stream = TrainLoader(slices(30), 12, 5, parts=parts, process_index=index, process_count=processes)
        assert (stream.batches_per_epoch, stream.steps_per_epoch) == (2, 2 * parts)
        shares.append(order(stream, 6 * parts))
        assert shares[-1].shape == (6 * parts, 12 // parts // processes)
    together = np.concatenate(shares, axis=1).reshape(whole.shape)
    np.testing.assert_array_equal(np.sort(together), np.sort(whole))


def test_a_clip_has_the_slices_before_it_in_its_file():
    records = Records(7)
    for number, record in enumerate(list.__iter__(records)):
        record["file"], record["slice"] = b"ab"[number // 4 : number // 4 + 1], np.int32(number % 4)
    drawn = next(TrainLoader(loader.Clips(Slices(records, DataConfig(), SIZE), 2), 7, 0))
    value = {name: np.rint(drawn[name][..., 0, 0, 0] * 100).astype(int) - 1 for name in ("images", "before")}
    assert sorted(value["images"]) == list(range(7))
    for own, before, present in zip(value["images"], value["before"], drawn["present"], strict=True):
        assert present.tolist() == [own % 4 >= 1, own % 4 >= 2]
        assert (before[present] == (own - np.array([1, 2]))[present]).all()


def test_batches_are_read_ahead():
    records = Records(64)
    stream = TrainLoader(Slices(records, DataConfig(), SIZE), 4, 0)
    next(stream)
    until = time.monotonic() + 5
    while len(records.read) <= 16 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(records.read) > 16


# Training: the position.


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 13])
def test_a_saved_position_is_restored_exactly(taken):
    stream = TrainLoader(slices(26), 4, 3)
    order(stream, taken) if taken else None
    state = json.loads(json.dumps(stream.get_state()))
    following = order(stream, 14)
    for used in (0, 7):
        other = TrainLoader(slices(26), 4, 3)
        order(other, used) if used else None
        other.set_state(state)
        assert other.get_state() == state
        np.testing.assert_array_equal(order(other, 14), following)


def test_a_position_holds_for_another_number_of_processes():
    stream = TrainLoader(slices(26), 4, 3)
    order(stream, 9)
    state, following = stream.get_state(), order(stream, 8)
    parts = []
    for index in range(2):
        part = TrainLoader(slices(26), 4, 3, process_index=index, process_count=2)
        part.set_state(state)
        parts.append(order(part, 8))
    np.testing.assert_array_equal(np.sort(np.concatenate(parts, axis=1)), np.sort(following))


def test_too_few_slices_for_a_batch():
    with pytest.raises(DataError, match="has 3 slices, fewer than one batch of 4; use --batch-size 3 or less"):
        TrainLoader(slices(3), 4, 0)


def test_processes_that_do_not_divide_the_batch():
    with pytest.raises(DataError, match="--batch-size 4 does not divide over 3 processes"):
        TrainLoader(slices(9), 4, 0, process_count=3)
    with pytest.raises(DataError, match="--batch-size 4 does not divide over 2 processes"):
        TrainLoader(slices(9), 4, 0, parts=4, process_count=2)


# Evaluation.


@pytest.mark.parametrize("count", [1, 3, 8, 13])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 4])
def test_evaluation_sees_each_slice_once_in_as_many_batches_per_process(count, processes, batch):
    split, visited = slices(count), []
    shares = [
        list(eval_batches(split, batch, process_index=index, process_count=processes)) for index in range(processes)
    ]
    assert {len(share) for share in shares} == {-(-count // (processes * batch))}
    for part in itertools.chain(*shares):
        assert part.images.shape == (batch, *SIZE, 1)
        filled = len(part.samples)
        np.testing.assert_array_equal(part.mask, np.arange(batch) < filled)
        for image, sample in zip(part.images[:filled], part.samples, strict=True):
            np.testing.assert_array_equal(image, split[sample.index])
            visited.append(sample.index)
        np.testing.assert_array_equal(part.images[filled:], 0)
    assert sorted(visited) == list(range(count))
    assert processes > 1 or visited == sorted(visited)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("room", [0, 1 << 30])
def test_one_evaluation_pass_reads_each_record_once(room, processes, monkeypatch):
    monkeypatch.setattr(loader, "_kept_bytes", lambda: room)
    records = Records(13)
    split = Slices(records, DataConfig(), SIZE)
    for passes in (1, 2):
        for index in range(processes):
            for batch in eval_batches(split, 4, process_index=index, process_count=processes):
                for sample in batch.samples:
                    assert sample.pixels.shape == SIZE
        assert sorted(records.read) == sorted([*range(13)] * passes)


def test_masked_means_are_exact():
    total = sum((part.images.mean((1, 2, 3)) * part.mask).sum() for part in eval_batches(slices(13), 4))
    assert total / 13 == pytest.approx(np.mean(np.arange(1, 14)) / 100)


def test_a_split_without_images_is_named_before_anything_is_built(tmp_path):
    for name in ("a1.nii", "b2.nii"):
        nibabel.save(nibabel.Nifti1Image(np.ones(SIZE, np.int16), np.eye(4)), tmp_path / name)
    rows = ["path,role,case,split,reason", "a1.nii,image,a,train,", "b2.nii,image,b,test,"]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    config = DataConfig(data=str(tmp_path / "x.csv"), tfds_dir=str(tmp_path / "tfds"))
    survey = hip_mri.look(config, SIZE)
    with pytest.raises(DataError, match=r"x\.csv: has no images of the split validation"):
        open_splits(survey, config, SIZE, ["train", "validation"])
    assert not (tmp_path / "tfds").exists()


def test_splits_are_opened_by_name_at_the_models_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(data="phantom", tfds_dir="tfds", phantom_cases=3, phantom_slices=2)
    survey, lines = hip_mri.look(config, SIZE), []
    test, train = open_splits(survey, config, SIZE, ["test", "train"], lines.append)
    assert (len(test), len(train)) == (4, 6)
    assert (survey.slices("test"), survey.slices("train")) == (4, 6)
    for split in (test, train):
        assert split[0].shape == (*SIZE, 1)
    assert all("keras_slices_test/" in test.sample(n).file for n in range(4))
    assert any("Built" in line for line in lines)
    assert any("train 6 files of 3 cases" in line for line in survey.facts())
