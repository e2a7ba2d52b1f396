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
from changed_settings import FIELDS, changed
from conftest import REAL_DATA
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import vqvae_jax
from vqvae_jax.coding.encoded import EncodedImages
from vqvae_jax.config import Config, ModelConfig
from vqvae_jax.data import grid, intensity, loader
from vqvae_jax.errors import CheckpointError, DataError
from vqvae_jax.inference import trained_model
from vqvae_jax.inference.trained_model import TrainedModel
from vqvae_jax.training.state import init_variables
from vqvae_jax.training.step import make_eval_step

RNG = np.random.default_rng(0)
SIZE = (32, 16)
LARGER = (45, 23)
"""Larger than the run's size, and no multiple of the downsampling."""
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session")
def tiny(tiny_run):
    return vqvae_jax.load(tiny_run[0] / "runs/tiny")


@pytest.fixture(scope="session")
def resizing(tiny):
    config = dataclasses.replace(tiny.config, data=dataclasses.replace(tiny.config.data, fit="resize"))
    return TrainedModel(config, tiny._variables)


def smooth(*shape, scale=500, dtype=np.float32):
    """Bright blobs, which a model that has learned anything keeps at their place."""
    rows, columns = np.mgrid[: shape[-2], : shape[-1]]
    phase = RNG.uniform(0, 3, (*shape[:-2], 1, 1))
    return (scale * (1 + np.sin(rows / 5 + phase) * np.cos(columns / 4))).astype(dtype)


@pytest.mark.parametrize("shape", [(32, 16), (45, 23), (3, 20, 9), (2, 32, 16, 1), (7, 7)])
def test_any_shape_comes_back_as_float32_of_that_shape(tiny, resizing, shape):
    x = RNG.normal(size=shape)
    for model in (tiny, resizing):
        y = model.reconstruct(x)
        assert (y.shape, y.dtype) == (shape, np.float32)
        assert y.min() >= x.min() - 1e-5 and y.max() <= x.max() + 1e-5


@pytest.mark.parametrize("shape", [(20, 11), LARGER])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_intensities_does_not_matter(tiny, shape, factor):
    x = smooth(2, *shape)
    y = tiny.reconstruct(x)
    np.testing.assert_allclose(tiny.reconstruct(x * factor - 3 * factor) / factor + 3, y, atol=2)


@pytest.mark.parametrize("dtype", ["bool", "u1", "i2", "u2", "i8", "f2", "f4", "f8", "bfloat16"])
def test_any_real_type_is_taken_for_its_values(tiny, dtype):
    x = jax.numpy.asarray(RNG.integers(0, 2, SIZE), "bfloat16") if dtype == "bfloat16" else RNG.integers(0, 2, SIZE)
    x = np.asarray(x, dtype)
    np.testing.assert_array_equal(tiny.reconstruct(x), tiny.reconstruct(x.astype(np.float32)))


@pytest.mark.parametrize("value", [0, -7.3, 1e38])
def test_an_image_of_one_value_comes_back_exactly(tiny, resizing, value):
    for model in (tiny, resizing):
        x = np.full((20, 16), value, np.float32)
        np.testing.assert_array_equal(model.reconstruct(x), x)


@pytest.mark.parametrize("fit", ["pad-crop", "resize"])
@pytest.mark.parametrize("shape", [SIZE, (21, 13), (32, 9)])
def test_what_fits_the_runs_size_gets_what_evaluation_gives(tiny, resizing, fit, shape):
    model = tiny if fit == "pad-crop" else resizing
    image = smooth(*shape)
    limits = intensity.intensity_range(image, tiny.config.data.scale_percentiles)
    record = {"image": image, "affine": np.eye(4), "range": np.float32(limits), "file": b"", "case": b"", "slice": 0}
    batch = loader.Slices([record], model.config.data, SIZE)[0][None, None]
    output = make_eval_step(model.config)(model._variables, batch, np.ones((1, 1)))
    own = grid.unfit(np.asarray(output.reconstruction)[0, 0, ..., 0], shape, fit)
    np.testing.assert_allclose(model.reconstruct(image), intensity.unscale(own, *limits), rtol=1e-4, atol=1e-2)


def perfect(tiny, fit):
    """A model that loses nothing: every 4 x 4 pixels it is shown become a code of their own."""
    model = dataclasses.replace(tiny.config.model, num_embeddings=10**6)
    config = dataclasses.replace(tiny.config, model=model, data=dataclasses.replace(tiny.config.data, fit=fit))
    made, codebook = TrainedModel(config, {}), []

    def to_indices(_, x):
        n, height, width, _ = x.shape
        codebook.extend(x.reshape(n, height // 4, 4, width // 4, 4).swapaxes(2, 3).reshape(-1, 4, 4))
        return np.arange(len(codebook) - x.size // 16, len(codebook)).reshape(n, height // 4, width // 4)

    def from_indices(_, indices):
        n, height, width = indices.shape
        return np.array(codebook)[indices].swapaxes(2, 3).reshape(n, 4 * height, 4 * width, 1)

    made._to_indices, made._from_indices = to_indices, from_indices
    return made


@pytest.mark.parametrize("shape", [SIZE, (7, 11), (45, 16), (32, 23), (3, 61, 47), (70, 20, 50)])
def test_a_perfect_model_gives_every_pixel_back_at_its_place(tiny, shape):
    x = RNG.uniform(100, 900, shape)
    model = perfect(tiny, "pad-crop")
    encoded = model.encode(x)
    for size, side, least in zip(encoded.indices.shape[1:], shape[-2:], SIZE, strict=True):
        assert 4 * size == max(least, 4 * np.ceil(side / 4))
    limits = encoded.ranges[:, :, None, None] if x.ndim == 3 else encoded.ranges[0][:, None, None]
    expected = x.clip(*np.moveaxis(limits, 1, 0)) if x.ndim == 3 else x.clip(*limits)
    np.testing.assert_allclose(model.decode(encoded), expected, atol=0.02)


def test_a_run_of_resized_slices_resizes_and_back(tiny):
    x = smooth(64, 48)
    model = perfect(tiny, "resize")
    encoded = model.encode(x)
    assert encoded.indices.shape[1:] == (8, 4)
    np.testing.assert_allclose(model.decode(encoded), x, atol=200)  # of 1000: each half wave has 5 pixels left


def test_reconstruct_is_decode_of_encode_however_they_are_batched(tiny):
    """130 slices of 32 x 16 are two batches and a part of one on a CPU."""
    x = smooth(130, *SIZE) + RNG.normal(0, 90, (130, *SIZE))
    y = tiny.reconstruct(x)
    whole = tiny.encode(x)
    np.testing.assert_array_equal(tiny.decode(whole), y)
    for start, stop in [(0, 1), (63, 66), (100, 130), (7, 90)]:
        part = EncodedImages(whole.indices[start:stop], (stop - start, *SIZE), whole.ranges[start:stop])
        np.testing.assert_array_equal(tiny.decode(part), y[start:stop])
        np.testing.assert_array_equal(tiny.encode(x[start:stop]).indices, part.indices)


def test_a_grid_is_compiled_once_for_any_count_of_slices(tiny):
    compiled = []

    def count(name, *_, **__):
        compiled.append(name == COMPILED)

    tiny.reconstruct(RNG.normal(size=LARGER))
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for number in (1, 2, 3, 50, 97):
            tiny.reconstruct(RNG.normal(size=(number, 46, 22)))
        assert sum(compiled) == 0
        tiny.reconstruct(RNG.normal(size=(36, 16)))  # another grid: the count counts
        assert sum(compiled) > 0
    finally:
        jax.monitoring.clear_event_listeners()


def test_codes_are_what_they_say(tiny):
    x = smooth(3, *SIZE)
    encoded = tiny.encode(x)
    indices = encoded.indices
    assert (indices.shape, indices.dtype, encoded.shape) == ((3, 8, 4), np.int32, x.shape)
    assert indices.min() >= 0 and indices.max() < tiny.config.model.num_embeddings
    expected = np.percentile(x, tiny.config.data.scale_percentiles, axis=(1, 2)).T
    np.testing.assert_allclose(encoded.ranges, expected, rtol=1e-5)


def test_a_given_range_takes_the_place_of_each_images_percentiles(tiny):
    x = smooth(2, *SIZE) * np.float32([1, 3])[:, None, None]
    y = tiny.reconstruct(x, intensity_range=(200, 700))
    assert y.min() >= 200 - 1e-3 and y.max() <= 700 + 1e-3
    np.testing.assert_allclose(y, tiny.reconstruct(x.clip(200, 700), intensity_range=(200, 700)), atol=1e-3)
    for limits in ((1, 1), (2, 1), (0, np.nan), (0, np.inf)):
        with pytest.raises(DataError, match="intensity_range"):
            tiny.encode(x, intensity_range=limits)


def test_a_last_axis_of_length_1_is_a_channel(tiny):
    """[H, W, 1] is one image, not H images of W x 1."""
    x = smooth(*LARGER)
    y = tiny.reconstruct(x[..., None])
    assert y.shape == (*LARGER, 1)
    np.testing.assert_array_equal(y[..., 0], tiny.reconstruct(x))
    assert tiny.encode(x[..., None]).indices.shape == (1, 12, 6)
    np.testing.assert_array_equal(tiny.reconstruct(x[None, ..., None])[0, ..., 0], tiny.reconstruct(x))


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
    "images of one column": (np.ones((20, 16, 1, 1)), r"shape \(20, 16, 1, 1\); expected .*at least 7"),
    "fewer than 7 rows": (np.ones((6, 20)), "at least 7"),
    "NaN": (with_pixel(np.nan), "1 pixels that are NaN"),
    "inf": (with_pixel(-np.inf), "1 pixels"),
    "beyond float32": (with_pixel(1e39), "1 pixels"),
    "complex": (np.ones(SIZE, complex), "type complex128"),
    "text": (np.full(SIZE, "a"), "expected real numbers"),
    "objects": (np.full(SIZE, None), "expected real numbers"),
}


@pytest.mark.parametrize(("x", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_refused_in_one_line(tiny, x, reason):
    with pytest.raises(DataError, match=reason) as caught:
        tiny.reconstruct(x)
    assert "\n" not in str(caught.value)


def test_codes_of_another_model_are_refused(tiny):
    encoded = tiny.encode(smooth(3, *SIZE))
    indices, ranges = encoded.indices, encoded.ranges
    changed = {
        "indices": [indices[:, 1:], indices[None], indices[0], indices + 32, indices - 32, indices[:2]],
        "shape": [(3, 64, 64), (2, *SIZE), SIZE, (3,), ()],
        "ranges": [ranges[:2], ranges * np.nan, ranges[:, :1]],
    }
    for name, values in changed.items():
        for value in values:
            with pytest.raises(DataError):
                tiny.decode(dataclasses.replace(encoded, **{name: value}))


def test_threads_get_what_one_thread_gets(tiny):
    images = [smooth(count, *(SIZE, LARGER)[count % 2]) for count in range(1, 9)]
    expected = [tiny.reconstruct(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(tiny.reconstruct, images), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


# The fingerprint: of all that decoding depends on, and of nothing else.


MODELS = {
    "projected": {"codebook_update": "ema", "code_dim": 3, "residual": "pre", "latent_norm": False},
    "ema": {"codebook_update": "ema", "downsampling": 8},
    "gradient": {"attention": False},
    "imported": {"reference_flatten": True},
}


def small(**settings):
    """A model of random weights: its attention counts, and images have several of its codes."""
    sizes = {"image_size": (32, 16), "hidden_channels": 8, "embedding_dim": 4, "num_embeddings": 16}
    model = ModelConfig(residual_blocks=1, **sizes, **settings)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        drawn = rng.normal(0, 0.4, leaf.shape)
        return (np.abs(drawn) + 0.1 if path[-1].key in ("var", "counts") else drawn).astype(leaf.dtype)

    return TrainedModel(Config(model=model), jax.tree.map_with_path(draw, shapes))


def with_leaf(model, place, change):
    """The same model with the variable of this number changed, and the path of that variable."""
    paths, structure = jax.tree.flatten_with_path(jax.device_get(model._variables))
    leaves = [np.array(leaf) for _, leaf in paths]
    leaves[place] = change(leaves[place])
    other = TrainedModel(model.config, jax.tree.unflatten(structure, leaves))
    return other, jax.tree_util.keystr(paths[place][0], simple=True, separator="/")


def poisoned(leaf):
    return ~leaf if leaf.dtype == bool else np.full_like(leaf, np.nan)


@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_the_fingerprint_changes_with_the_variables_that_change_what_is_decoded(settings):
    """NaN in a variable is NaN in the image where decoding takes that variable."""
    model = small(**settings)
    indices = np.arange(16, dtype=np.int32).reshape(1, 4, 4)
    in_fingerprint, in_image = set(), set()
    for place in range(len(jax.tree.leaves(model._variables))):
        other, path = with_leaf(model, place, poisoned)
        if other.fingerprint != model.fingerprint:
            in_fingerprint.add(path)
        if np.isnan(model._from_indices(other._variables, indices)).any():
            in_image.add(path)
    assert in_fingerprint == in_image
    quantizer = {path.partition("quantizer/")[2] for path in in_image if "quantizer/" in path}
    projection = {"project_out/kernel", "project_out/bias", "quantizer/codebook"}
    assert quantizer == (projection if "code_dim" in settings else {"codebook"})
    assert any("decoder/" in path for path in in_image)
    assert not any("encoder/" in path for path in in_image)


def test_the_fingerprint_changes_with_the_least_change_of_any_of_its_numbers():
    model = small(**MODELS["projected"])

    def bend(leaf):
        leaf.flat[-1] = np.nextafter(leaf.flat[-1], np.float32(9))
        return leaf

    changed_at = set()
    for place, leaf in enumerate(jax.tree.leaves(model._variables)):
        if leaf.dtype == np.float32:
            other, path = with_leaf(model, place, bend)
            changed_at |= {path} if other.fingerprint != model.fingerprint else set()
    assert {"ema/quantizer/quantizer/codebook", "params/quantizer/project_out/kernel"} <= changed_at
    assert {"params/decoder/up2/kernel", "batch_stats/decoder/norm2/mean"} <= changed_at
    assert not {path for path in changed_at if "encoder" in path or "project_in" in path or path.endswith("sums")}


DECODING = {
    ("model", "image_size"),
    ("model", "downsampling"),
    ("model", "hidden_channels"),
    ("model", "residual_blocks"),
    ("model", "residual"),
    ("model", "attention"),
    ("model", "embedding_dim"),
    ("model", "num_embeddings"),
    ("model", "code_dim"),
    ("model", "reference_flatten"),
    ("model", "precision"),
    ("data", "fit"),
}


def test_the_fingerprint_changes_with_the_settings_of_decoding_alone():
    variables = {"params": {"decoder": {"a": np.arange(3, dtype=np.float32)}}}
    before = TrainedModel(Config(), variables).fingerprint
    found = {field for field in FIELDS if TrainedModel(changed(*field), variables).fingerprint != before}
    assert found == DECODING
    assert TrainedModel(Config(preset="hipmri"), variables).fingerprint == before


def test_the_fingerprint_is_the_same_wherever_the_model_is_loaded(tiny, tiny_run):
    again = vqvae_jax.load(str(tiny_run[0] / "runs/tiny"))
    assert again.fingerprint == tiny.fingerprint
    assert len(tiny.fingerprint) == 64


def test_the_fingerprint_in_older_files_is_still_the_models():
    """Written down once, computed with hashlib and json alone; a new setting must not change it."""
    config = Config(model=ModelConfig(image_size=(32, 16), hidden_channels=8))
    params = {"decoder": {"a": np.arange(3, dtype=np.float32)}, "quantizer": {"codebook": np.eye(2, dtype=np.float32)}}
    variables = {"params": params, "batch_stats": {"decoder": {"b": np.float32(0.5)}}}
    expected = "fe7eb9d0bdfb78ed765cb7a8e91207123fc253896d75120baccfba28ff4da1a4"
    assert TrainedModel(config, variables).fingerprint == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["projected", "imported"])
def test_a_jax_of_64_bits_gives_the_same_codes_images_and_fingerprint(name):
    x = smooth(3, *SIZE)
    model = small(**MODELS[name])
    encoded = model.encode(x)
    images = model.decode(encoded)
    assert len(np.unique(encoded.indices)) > 3
    with jax.enable_x64(True):
        wide = small(**MODELS[name])
        assert {leaf.dtype for leaf in jax.tree.leaves(wide._variables)} <= {np.dtype("float32"), np.dtype(bool)}
        assert wide.fingerprint == model.fingerprint
        np.testing.assert_array_equal(wide.encode(x).indices, encoded.indices, strict=True)
        np.testing.assert_array_equal(wide.decode(encoded), images, strict=True)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        vqvae_jax.load(tmp_path)


def test_the_examples_of_the_docstrings_run(tiny, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(tiny_run[0] / "runs/tiny")
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(trained_model, extraglobs={"model": tiny})
    assert found.attempted > 0
    assert found.failed == 0


def save(path, voxels, spacing=(0.8, 0.8, 3)):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -30, 12, 5
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def undirected(tiny):
    """A model of which it is not known in what direction its training slices lay."""
    data = dataclasses.replace(tiny.config.data, slice_direction=None)
    return TrainedModel(dataclasses.replace(tiny.config, data=data), tiny._variables)


@pytest.mark.parametrize("axis", range(3))
def test_a_volume_goes_slice_by_slice_along_the_axis_of_acquisition(undirected, tmp_path, axis):
    tiny = undirected
    voxels = np.moveaxis(smooth(4, *LARGER, dtype=np.int16), 0, axis)
    path = save(tmp_path / "in.nii.gz", voxels, np.insert([0.8, 0.8], axis, 3))
    result = tiny.reconstruct_nifti(path, tmp_path / "out.nii.gz", difference=tmp_path / "difference.nii")
    limits = intensity.intensity_range(voxels.astype(np.float32), tiny.config.data.scale_percentiles)
    slices = np.moveaxis(voxels, axis, 0)
    expected = tiny.reconstruct(slices, intensity_range=limits)
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert result.slice_axis == axis and written.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.moveaxis(written.get_fdata(), axis, 0), np.rint(expected))
    difference = nibabel.load(tmp_path / "difference.nii")
    assert difference.get_data_dtype() == np.float32
    np.testing.assert_allclose(np.moveaxis(difference.get_fdata(), axis, 0), expected - slices, atol=1e-3)
    for index in range(4):
        a, b = (intensity.scale(x[index].astype(np.float32), *limits) for x in (expected, slices))
        assert result.ssim_per_slice[index] == pytest.approx(structural_similarity(a, b, data_range=1), abs=1e-5)
        assert result.psnr_per_slice[index] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1), abs=1e-3)
    assert result.ssim == pytest.approx(np.mean(result.ssim_per_slice))


@pytest.fixture(scope="module")
def head_foot(tiny):
    """A model whose training volumes were cut along head-foot, which was their last axis."""
    data = dataclasses.replace(tiny.config.data, slice_direction="head-foot", slice_axis=2)
    return TrainedModel(dataclasses.replace(tiny.config, data=data), tiny._variables)


@pytest.fixture(scope="module")
def anatomy():
    """A volume in the order of training, left-right, front-back, head-foot; its cubic voxels tell nothing."""
    return nibabel.Nifti1Image(smooth(8, *LARGER, dtype=np.int16).transpose(1, 2, 0).copy(), np.eye(4))


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize("place", range(3))
def test_a_volume_is_cut_along_the_direction_of_training_however_its_axes_lie(
    head_foot, anatomy, tmp_path, place, flip
):
    """The codes are those of the same volume in the order of training, slice for slice."""
    nibabel.save(anatomy, tmp_path / "trained.nii")
    others = [axis for axis in range(3) if axis != place]
    turned = anatomy.as_reoriented(np.array([[others[0], 1], [others[1], 1], [place, flip]]))
    assert turned.shape == tuple(np.insert(LARGER, place, 8))
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    trained = head_foot.encode_nifti(tmp_path / "trained.nii")
    found = head_foot.encode_nifti(tmp_path / "turned.nii.gz")
    assert (found.slice_axis, found.axis_reason, found.axis_doubt) == (place, "head-foot", "")
    np.testing.assert_array_equal(found.images.indices[::flip], trained.images.indices)
    head_foot.decode_nifti(found, tmp_path / "out.nii.gz")
    head_foot.decode_nifti(trained, tmp_path / "out.nii")
    written, expected = (nibabel.load(tmp_path / name) for name in ("out.nii.gz", "out.nii"))
    np.testing.assert_array_equal(nibabel.as_closest_canonical(written).get_fdata(), expected.get_fdata())


def test_a_direction_between_two_axes_is_the_nearest_axis(head_foot, anatomy, tmp_path):
    """As of a tilted scan; the axis that was asked for comes first."""
    tilt = np.deg2rad(30)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    turned = nibabel.Nifti1Image(np.asarray(anatomy.dataobj), affine).as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))
    nibabel.save(turned, tmp_path / "tilted.nii")
    assert head_foot.encode_nifti(tmp_path / "tilted.nii").slice_axis == 0
    asked = head_foot.encode_nifti(tmp_path / "tilted.nii", slice_axis=1)
    assert (asked.slice_axis, asked.axis_reason, asked.axis_doubt) == (1, "as asked", "")


def test_a_header_that_does_not_say_its_directions_is_a_doubt(head_foot, anatomy, tmp_path):
    path = tmp_path / "lost.nii"
    nibabel.save(nibabel.Nifti1Image(np.asarray(anatomy.dataobj), None), path)
    header = nibabel.load(path).header
    assert header["qform_code"] == header["sform_code"] == 0
    expected = "the header does not say which axis is head-foot"
    assert head_foot.encode_nifti(path).axis_doubt == expected
    assert head_foot.reconstruct_nifti(path, tmp_path / "out.nii").axis_doubt == expected
    assert head_foot.encode_nifti(path, slice_axis=2).axis_doubt == ""


@pytest.mark.parametrize("shape", [(30, 16), (30, 16, 1), (30, 1, 16), (30, 16, 5), (30, 16, 5, 1)])
def test_codes_of_a_file_decode_to_the_file_that_reconstruct_writes(tiny, tmp_path, shape):
    path = save(tmp_path / "in.nii", RNG.integers(0, 900, shape).astype(np.uint16))
    tiny.reconstruct_nifti(path, tmp_path / "a.nii")
    tiny.decode_nifti(tiny.encode_nifti(path), tmp_path / "b.nii")
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()
    assert nibabel.load(tmp_path / "b.nii").shape == shape


def test_codes_with_the_header_of_another_file_are_refused(undirected, tmp_path):
    tiny = undirected
    encoded = tiny.encode_nifti(save(tmp_path / "a.nii", smooth(3, *SIZE), (3, 1, 1)))
    other = tiny.encode_nifti(save(tmp_path / "b.nii", np.moveaxis(smooth(3, *SIZE), 0, 2)))
    with pytest.raises(DataError, match="are not those of a file of shape"):
        tiny.decode_nifti(dataclasses.replace(encoded, header=other.header), tmp_path / "c.nii")
    assert not (tmp_path / "c.nii").exists()


def test_a_constant_file_comes_back_byte_for_byte(tiny, tmp_path):
    path = save(tmp_path / "in.nii", np.full((20, 16, 3), 7, np.int16))
    result = tiny.reconstruct_nifti(path, tmp_path / "out.nii")
    assert path.read_bytes() == (tmp_path / "out.nii").read_bytes()
    assert result.ssim == 1


def test_refusals_name_the_file_and_leave_nothing(tiny, tmp_path):
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
            tiny.reconstruct_nifti(source, tmp_path / name, **options)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real MRI beside the checkout")
@pytest.mark.slow
@pytest.mark.parametrize("plane", ["tra", "cor", "sag"])
def test_real_volumes_keep_their_geometry(undirected, tmp_path, plane):
    source = REAL_DATA / f"prostatex/volumes/prostatex_0000_t2tse{plane}.nii.gz"
    target = tmp_path / "out.nii.gz"
    result = undirected.reconstruct_nifti(source, target)
    assert result.slice_axis == 2
    before, after = nibabel.load(source), nibabel.load(target)
    assert before.header == after.header
    before, after = sitk.ReadImage(str(source)), sitk.ReadImage(str(target))
    for fact in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection", "GetPixelIDTypeAsString"):
        assert getattr(before, fact)() == getattr(after, fact)()
