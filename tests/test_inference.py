"""A trained model used on images of any size, type and scale, on NIfTI files, and by several threads."""

import dataclasses
import doctest
import gzip
from concurrent.futures import ThreadPoolExecutor

import jax
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import REAL_DATA
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import vqvae_jax
from vqvae_jax import inference, training
from vqvae_jax.config import Config, ModelConfig
from vqvae_jax.data import loader, nifti
from vqvae_jax.errors import CheckpointError, DataError

RNG = np.random.default_rng(0)
SIZE = (32, 16)
LARGER = (45, 23)
"""Larger than the run's size, and no multiple of the downsampling."""
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session")
def run(tiny_run):
    return vqvae_jax.load(tiny_run[0] / "runs/tiny")


@pytest.fixture(scope="session")
def resizing(run):
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, fit="resize"))
    return inference.Run(config, run._variables)


def smooth(*shape, scale=500, dtype=np.float32):
    """Bright blobs, which a model that has learned anything keeps at their place."""
    rows, columns = np.mgrid[: shape[-2], : shape[-1]]
    phase = RNG.uniform(0, 3, (*shape[:-2], 1, 1))
    return (scale * (1 + np.sin(rows / 5 + phase) * np.cos(columns / 4))).astype(dtype)


@pytest.mark.parametrize("shape", [(32, 16), (45, 23), (3, 20, 9), (2, 32, 16, 1), (1, 1)])
def test_any_shape_comes_back_as_float32_of_that_shape(run, resizing, shape):
    x = RNG.normal(size=shape)
    for model in (run, resizing):
        y = model.reconstruct(x)
        assert (y.shape, y.dtype) == (shape, np.float32)
        assert y.min() >= x.min() - 1e-5 and y.max() <= x.max() + 1e-5


@pytest.mark.parametrize("shape", [(20, 11), LARGER])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_intensities_does_not_matter(run, shape, factor):
    x = smooth(2, *shape)
    y = run.reconstruct(x)
    np.testing.assert_allclose(run.reconstruct(x * factor - 3 * factor) / factor + 3, y, atol=2)


@pytest.mark.parametrize("dtype", ["bool", "u1", "i2", "u2", "i8", "f2", "f4", "f8", "bfloat16"])
def test_any_real_type_is_taken_for_its_values(run, dtype):
    x = jax.numpy.asarray(RNG.integers(0, 2, SIZE), "bfloat16") if dtype == "bfloat16" else RNG.integers(0, 2, SIZE)
    x = np.asarray(x, dtype)
    np.testing.assert_array_equal(run.reconstruct(x), run.reconstruct(x.astype(np.float32)))


@pytest.mark.parametrize("value", [0, -7.3, 1e38])
def test_an_image_of_one_value_comes_back_exactly(run, resizing, value):
    for model in (run, resizing):
        x = np.full((20, 16), value, np.float32)
        np.testing.assert_array_equal(model.reconstruct(x), x)


@pytest.mark.parametrize("fit", ["pad-crop", "resize"])
@pytest.mark.parametrize("shape", [SIZE, (21, 13), (32, 9)])
def test_what_fits_the_runs_size_gets_what_evaluation_gives(run, resizing, fit, shape):
    model = run if fit == "pad-crop" else resizing
    image = smooth(*shape)
    limits = nifti.intensity_range(image, run.config.data.scale_percentiles)
    record = {"image": image, "affine": np.eye(4), "range": np.float32(limits), "file": b"", "case": b"", "slice": 0}
    batch = loader.Slices([record], model.config.data, SIZE)[0][None, None]
    output = training.make_eval_step(model.config)(model._variables, batch, np.ones((1, 1)))
    own = nifti.unfit(np.asarray(output.reconstruction)[0, 0, ..., 0], shape, fit)
    np.testing.assert_allclose(model.reconstruct(image), nifti.unscale(own, *limits), rtol=1e-4, atol=1e-2)


def perfect(run, fit):
    """A model of two levels that loses nothing but the precision of 1 in 60,000; its grids are multiples of 4."""
    model = dataclasses.replace(run.config.model, num_embeddings=60_001)
    config = dataclasses.replace(run.config, model=model, data=dataclasses.replace(run.config.data, fit=fit))
    made = inference.Run(config, {})
    made._to_codes = lambda _, x: tuple((60_000 * y[..., 0]).round().astype("int32") for y in (x, x[:, ::4, ::4]))
    made._from_codes = lambda _, codes: codes[0][..., None] / np.float32(60_000)
    return made


@pytest.mark.parametrize("shape", [SIZE, (7, 11), (45, 16), (32, 23), (3, 61, 47), (70, 20, 50)])
def test_a_perfect_model_gives_every_pixel_back_at_its_place(run, shape):
    x = RNG.uniform(100, 900, shape)
    model = perfect(run, "pad-crop")
    codes = model.encode(x)
    for size, side, least in zip(codes.levels[0].shape[1:], shape[-2:], SIZE, strict=True):
        assert size == max(least, 4 * np.ceil(side / 4))
    limits = codes.ranges[:, :, None, None] if x.ndim == 3 else codes.ranges[0][:, None, None]
    expected = x.clip(*np.moveaxis(limits, 1, 0)) if x.ndim == 3 else x.clip(*limits)
    np.testing.assert_allclose(model.decode(codes), expected, atol=0.02)


def test_a_run_of_resized_slices_resizes_and_back(run):
    x = smooth(64, 48)
    model = perfect(run, "resize")
    codes = model.encode(x)
    assert codes.levels[0].shape[1:] == SIZE
    np.testing.assert_allclose(model.decode(codes), x, atol=200)  # of 1000: each half wave has 5 pixels left


def test_reconstruct_is_decode_of_encode_however_they_are_batched(run):
    """130 slices of 32 x 16 are two batches and a part of one on a CPU."""
    x = smooth(130, *SIZE) + RNG.normal(0, 90, (130, *SIZE))
    y = run.reconstruct(x)
    whole = run.encode(x)
    np.testing.assert_array_equal(run.decode(whole), y)
    for start, stop in [(0, 1), (63, 66), (100, 130), (7, 90)]:
        part = inference.Codes(
            tuple(level[start:stop] for level in whole.levels), (stop - start, *SIZE), whole.ranges[start:stop]
        )
        np.testing.assert_array_equal(run.decode(part), y[start:stop])
        again = run.encode(x[start:stop])
        for found, expected in zip(again.levels, part.levels, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_grid_is_compiled_once_for_any_count_of_slices(run):
    compiled = []

    def count(name, *_, **__):
        compiled.append(name == COMPILED)

    run.reconstruct(RNG.normal(size=LARGER))
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for number in (1, 2, 3, 50, 97):
            run.reconstruct(RNG.normal(size=(number, 46, 22)))
        assert sum(compiled) == 0
        run.reconstruct(RNG.normal(size=(36, 16)))  # another grid: the count counts
        assert sum(compiled) > 0
    finally:
        jax.monitoring.clear_event_listeners()


def test_codes_are_what_they_say(run):
    x = smooth(3, *SIZE)
    codes = run.encode(x)
    (level,) = codes.levels
    assert (level.shape, level.dtype, codes.shape) == ((3, 8, 4), np.int32, x.shape)
    assert level.min() >= 0 and level.max() < run.config.model.num_codes
    expected = np.percentile(x, run.config.data.scale_percentiles, axis=(1, 2)).T
    np.testing.assert_allclose(codes.ranges, expected, rtol=1e-5)


def test_a_given_range_takes_the_place_of_each_images_percentiles(run):
    x = smooth(2, *SIZE) * np.float32([1, 3])[:, None, None]
    y = run.reconstruct(x, intensity_range=(200, 700))
    assert y.min() >= 200 - 1e-3 and y.max() <= 700 + 1e-3
    np.testing.assert_allclose(y, run.reconstruct(x.clip(200, 700), intensity_range=(200, 700)), atol=1e-3)
    for limits in ((1, 1), (2, 1), (0, np.nan), (0, np.inf)):
        with pytest.raises(DataError, match="intensity_range"):
            run.encode(x, intensity_range=limits)


def with_pixel(value):
    x = np.ones(SIZE)
    x[3, 4] = value
    return x


REFUSED = {
    "one axis": (np.ones(9), r"shape \(9,\)"),
    "two channels": (np.ones((2, 9, 9, 2)), "shape"),
    "five axes": (np.ones((1, 1, 1, 9, 9)), "shape"),
    "no image": (np.ones((0, 9, 9)), "shape"),
    "no pixel": (np.ones((9, 0)), "shape"),
    "NaN": (with_pixel(np.nan), "1 pixels that are NaN"),
    "inf": (with_pixel(-np.inf), "1 pixels"),
    "beyond float32": (with_pixel(1e39), "1 pixels"),
    "complex": (np.ones(SIZE, complex), "type complex128"),
    "text": (np.full(SIZE, "a"), "expected real numbers"),
    "objects": (np.full(SIZE, None), "expected real numbers"),
}


@pytest.mark.parametrize(("x", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_refused_in_one_line(run, x, reason):
    with pytest.raises(DataError, match=reason) as caught:
        run.reconstruct(x)
    assert "\n" not in str(caught.value)


def test_codes_of_another_model_are_refused(run):
    codes = run.encode(smooth(3, *SIZE))
    (level,) = codes.levels
    changed = {
        "levels": [(level[:, 1:],), (level, level), (), (level + 32,), (level - 32,), (level[:2],)],
        "shape": [(3, 64, 64), (2, *SIZE), SIZE, (3,), ()],
        "ranges": [codes.ranges[:2], codes.ranges * np.nan, codes.ranges[:, :1]],
    }
    for name, values in changed.items():
        for value in values:
            with pytest.raises(DataError):
                run.decode(dataclasses.replace(codes, **{name: value}))


def test_threads_get_what_one_thread_gets(run):
    images = [smooth(count, *(SIZE, LARGER)[count % 2]) for count in range(1, 9)]
    expected = [run.reconstruct(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(run.reconstruct, images), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_the_fingerprint_is_the_models_own(run, tiny_run):
    same = vqvae_jax.load(str(tiny_run[0] / "runs/tiny"))
    assert same.fingerprint == run.fingerprint
    assert len(run.fingerprint) == 64
    bent = jax.tree.map(np.array, run._variables)
    first = jax.tree.leaves(bent)[0]
    first.flat[0] = np.nextafter(first.flat[0], np.float32(9))
    assert inference.Run(run.config, bent).fingerprint != run.fingerprint
    model = dataclasses.replace(run.config.model, commitment_cost=0.3)
    other = inference.Run(dataclasses.replace(run.config, model=model), run._variables)
    assert other.fingerprint != run.fingerprint


def test_the_fingerprint_in_older_files_is_still_the_models():
    """Written down from the first version that made .vqz files; a new setting must not change it."""
    config = Config(model=ModelConfig(image_size=(32, 16), hidden_channels=8, revive_below=0.1))
    variables = {"params": {"a": np.arange(3, dtype=np.float32)}}
    expected = "51767d76a18219c84d91dfd066dd1100039c74c1989fde4711547e1153f7aacd"
    assert inference.Run(config, variables).fingerprint == expected


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        vqvae_jax.load(tmp_path)


def test_the_examples_of_the_docstrings_run(run, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(tiny_run[0] / "runs/tiny")
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(inference, extraglobs={"run": run})
    assert found.attempted > 0
    assert found.failed == 0


def save(path, voxels, spacing=(0.8, 0.8, 3)):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -30, 12, 5
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("axis", range(3))
def test_a_volume_goes_slice_by_slice_along_the_axis_of_acquisition(run, tmp_path, axis):
    voxels = np.moveaxis(smooth(4, *LARGER, dtype=np.int16), 0, axis)
    path = save(tmp_path / "in.nii.gz", voxels, np.insert([0.8, 0.8], axis, 3))
    result = run.reconstruct_nifti(path, tmp_path / "out.nii.gz", difference=tmp_path / "difference.nii")
    limits = nifti.intensity_range(voxels.astype(np.float32), run.config.data.scale_percentiles)
    slices = np.moveaxis(voxels, axis, 0)
    expected = run.reconstruct(slices, intensity_range=limits)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert result.slice_axis == axis and written.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.moveaxis(written.get_fdata(), axis, 0), np.rint(expected))
    difference = nibabel.load(tmp_path / "difference.nii")
    assert difference.get_data_dtype() == np.float32
    np.testing.assert_allclose(np.moveaxis(difference.get_fdata(), axis, 0), expected - slices, atol=1e-3)
    for index in range(4):
        a, b = (nifti.scale(x[index].astype(np.float32), *limits) for x in (expected, slices))
        assert result.ssim_per_slice[index] == pytest.approx(structural_similarity(a, b, data_range=1), abs=1e-5)
        assert result.psnr_per_slice[index] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), abs=1e-3)
    assert result.ssim == pytest.approx(np.mean(result.ssim_per_slice))


@pytest.mark.parametrize("shape", [(30, 16), (30, 16, 1), (30, 1, 16), (30, 16, 5), (30, 16, 5, 1)])
def test_codes_of_a_file_decode_to_the_file_that_reconstruct_writes(run, tmp_path, shape):
    path = save(tmp_path / "in.nii", RNG.integers(0, 900, shape).astype(np.uint16))
    run.reconstruct_nifti(path, tmp_path / "a.nii")
    codes = run.encode_nifti(path)
    run.decode_nifti(codes, tmp_path / "b.nii")
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()
    assert nibabel.load(tmp_path / "b.nii").shape == shape


def test_codes_with_the_header_of_another_file_are_refused(run, tmp_path):
    codes = run.encode_nifti(save(tmp_path / "a.nii", smooth(3, *SIZE), (3, 1, 1)))
    other = run.encode_nifti(save(tmp_path / "b.nii", np.moveaxis(smooth(3, *SIZE), 0, 2)))
    with pytest.raises(DataError, match="are not those of a file of shape"):
        run.decode_nifti(dataclasses.replace(codes, header=other.header), tmp_path / "c.nii")
    assert not (tmp_path / "c.nii").exists()


def test_a_constant_file_comes_back_byte_for_byte(run, tmp_path):
    path = save(tmp_path / "in.nii", np.full((20, 16, 3), 7, np.int16))
    result = run.reconstruct_nifti(path, tmp_path / "out.nii")
    assert path.read_bytes() == (tmp_path / "out.nii").read_bytes()
    assert result.ssim == 1


def test_refusals_name_the_file_and_leave_nothing(run, tmp_path):
    good = save(tmp_path / "good.nii", smooth(20, 16))
    colours = save(tmp_path / "rgb.nii", np.zeros((20, 16), [(c, "u1") for c in "RGB"]))
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(gzip.compress(good.read_bytes())[:-60])
    before = sorted(tmp_path.iterdir())
    attempts = [
        (colours, "out.nii", {}, r"rgb\.nii has RGB voxels"),
        (cut, "out.nii", {}, r"cut\.nii\.gz is truncated"),
        (tmp_path / "none.nii", "out.nii", {}, r"none\.nii cannot be opened"),
        (good, "out.png", {}, r"out\.png: cannot tell the format"),
        (good, "cut.nii.gz", {}, r"cut\.nii\.gz: exists"),
        (good, "good.nii", {"overwrite": True}, "is the input itself"),
        (good, "out.nii", {"difference": tmp_path / "out.nii"}, "also the file for the difference"),
        (good, "out.nii", {"difference": tmp_path / "cut.nii.gz"}, "exists"),
    ]
    for source, name, options, reason in attempts:
        with pytest.raises(DataError, match=reason) as caught:
            run.reconstruct_nifti(source, tmp_path / name, **options)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real MRI beside the checkout")
@pytest.mark.parametrize("plane", ["cor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tra", "sag"))])
def test_real_volumes_keep_their_geometry(run, tmp_path, plane):
    source = REAL_DATA / f"prostatex/volumes/prostatex_0000_t2tse{plane}.nii.gz"
    target = tmp_path / "out.nii.gz"
    result = run.reconstruct_nifti(source, target)
    assert result.slice_axis == 2
    before, after = nibabel.load(source), nibabel.load(target)
    assert before.header == after.header
    before, after = sitk.ReadImage(str(source)), sitk.ReadImage(str(target))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelIDTypeAsString"):
        assert getattr(before, fact)() == getattr(after, fact)()
