"""The phantom: smooth, varied, reproducible anatomy, and files in the HipMRI layout, whole or not at all."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from vqvae_jax.data import pelvis, phantom
from vqvae_jax.data.pelvis import render_slice
from vqvae_jax.data.phantom import PhantomSpec, write_phantom
from vqvae_jax.errors import ConfigError, DataError

SIZE = (128, 64)
SMALL = PhantomSpec(train_cases=2, validation_cases=1, test_cases=1, slices_per_case=2, size=(64, 32))


def render(case: int, position: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    return render_slice(case, position, size=SIZE, noise=noise, seed=seed)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_arguments_give_the_same_slice() -> None:
    first = render(3, 0.2, noise=0.01)
    pelvis._anatomy.cache_clear()
    np.testing.assert_array_equal(first, render(3, 0.2, noise=0.01))


def test_a_slice_is_float32_finite_and_spans_the_intensities() -> None:
    for position in np.linspace(-1, 1, 7):
        image = render(0, position, noise=0.008)
        assert image.dtype == np.float32
        assert image.shape == SIZE
        assert np.isfinite(image).all()
        assert image.min() >= 0
        assert 350 < image.max() < 800


def test_the_bladder_is_about_as_bright_as_urine() -> None:
    for case in range(4):
        bladder = render(case, 0.3)[60:68, 20:32]
        assert bladder.max() == pytest.approx(600, rel=0.2)


@pytest.mark.parametrize("other", [{"case": 1}, {"seed": 1}])
def test_another_case_or_seed_is_another_anatomy(other: dict[str, int]) -> None:
    base = {"case": 0, "seed": 0, "position": 0.1}
    assert apart(render(**base), render(**(base | other))) > 20


def test_noise_depends_on_the_slice_and_leaves_the_anatomy() -> None:
    clean = [render(0, p) for p in (0.0, 0.001)]
    noise = [render(0, p, noise=0.01) - c for p, c in zip((0.0, 0.001), clean, strict=True)]
    body = clean[0] > 200
    assert abs(np.corrcoef(noise[0][body], noise[1][body])[0, 1]) < 0.1
    assert np.std(noise[0][body]) == pytest.approx(6.0, rel=0.1)
    assert abs(noise[0][body].mean()) < 0.5


def test_slices_change_smoothly() -> None:
    for case in range(3):
        steps = [apart(render(case, 0.0), render(case, d)) for d in (0.02, 0.1, 0.5)]
        assert 0 < steps[0] < 0.4 * steps[1]
        assert steps[1] < 0.8 * steps[2]


def test_sides_are_alike_but_not_mirrored() -> None:
    for case in range(4):
        image = render(case, 0.1)
        coarse = image.reshape(16, 8, 8, 8).mean(axis=(1, 3))  # 25 mm: organs and muscle groups, not texture
        assert np.corrcoef(coarse.ravel(), coarse[::-1].ravel())[0, 1] > 0.5
        assert apart(image, image[::-1]) > 10


def test_femoral_heads_are_bright_in_a_dark_joint_on_both_sides() -> None:
    pixel = 400 / SIZE[0]
    x, y = (((np.arange(n) - (n - 1) / 2) * pixel) for n in SIZE)
    for case in range(6):
        image = render(case, 0.06)
        for side in (-1, 1):
            radius = np.hypot(x[:, None] - side * 89, y[None, :])
            head, joint = image[radius < 12], image[(radius > 22) & (radius < 31)]
            assert head.mean() > 200
            assert joint.mean() < 0.8 * head.mean()


def test_background_is_empty_and_its_noise_is_rayleigh() -> None:
    sigma = 0.02 * 600
    for case in range(4):
        outside = render(case, 0.3) == 0
        assert outside[0, 0] and outside[-1, 0]
        assert outside.mean() > 0.04
        noise = render(case, 0.3, noise=0.02)[outside]
        assert noise.mean() == pytest.approx(sigma * np.sqrt(np.pi / 2), rel=0.1)


def test_a_small_slice_shows_the_same_anatomy() -> None:
    large = render_slice(2, 0.2, size=(256, 128), noise=0)
    pooled = large.reshape(128, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(pooled.ravel(), render(2, 0.2).ravel())[0, 1] > 0.98


def test_a_position_outside_the_pelvis_is_refused() -> None:
    with pytest.raises(ConfigError, match="position"):
        render(0, 1.5)


def test_files_have_the_hip_mri_layout(tmp_path: Path) -> None:
    folder = write_phantom(tmp_path / "deep" / "phantom", SMALL)
    cases = {}
    for name, count in (("train", 2), ("validate", 1), ("test", 1)):
        paths = sorted((folder / f"keras_slices_{name}").iterdir())
        found = [re.fullmatch(r"case_(\d{3})_week_0_slice_(\d+)\.nii\.gz", path.name) for path in paths]
        assert len(found) == count * 2
        assert {int(match[2]) for match in found} == {0, 1}
        cases[name] = {match[1] for match in found}
        assert len(cases[name]) == count
    assert len(set.union(*cases.values())) == 4, "a case is in two splits"


def test_a_file_holds_its_slice(tmp_path: Path) -> None:
    folder = write_phantom(tmp_path / "phantom", SMALL)
    image = nib.load(folder / "keras_slices_validate" / "case_002_week_0_slice_1.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    assert image.get_data_dtype() == np.int16
    assert image.shape == (64, 32)
    assert image.header.get_zooms() == pytest.approx((6.25, 6.25))
    np.testing.assert_allclose(np.diag(image.affine)[[0, 1, 3]], [6.25, 6.25, 1])
    pixels = np.asarray(image.dataobj)
    position = 2 / 3 - 1 / 3  # two slices divide [-1, 1] in three
    expected = render_slice(2, position, size=(64, 32), noise=SMALL.noise, seed=SMALL.seed)
    np.testing.assert_allclose(pixels, expected, atol=0.51)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    assert files(write_phantom(tmp_path / "a", SMALL)) == files(write_phantom(tmp_path / "b", SMALL))


def test_a_finished_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_phantom(tmp_path / "phantom", SMALL)
    monkeypatch.setattr(phantom, "render_slice", lambda *args, **kwargs: pytest.fail("it rendered again"))
    assert write_phantom(tmp_path / "phantom", SMALL) == folder


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    save, saved = nib.save, []

    def fail_on_third(image: nib.Nifti1Image, path: Path) -> None:
        if len(saved) == 2:
            raise error
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(nib, "save", fail_on_third)
    with pytest.raises(DataError if isinstance(error, OSError) else KeyboardInterrupt):
        write_phantom(tmp_path / "phantom", SMALL)
    assert len(saved) == 2
    assert list(tmp_path.iterdir()) == []


def test_another_specification_is_refused(tmp_path: Path) -> None:
    folder = write_phantom(tmp_path / "phantom", SMALL)
    before = files(folder)
    other = PhantomSpec(**{**vars(SMALL), "seed": 1})
    with pytest.raises(DataError, match=r"another phantom.*remove"):
        write_phantom(folder, other)
    assert files(folder) == before


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_phantom(tmp_path / "phantom", SMALL)
    monkeypatch.setattr(phantom, "FORMAT_VERSION", phantom.FORMAT_VERSION + 1)
    with pytest.raises(DataError, match="another phantom"):
        write_phantom(folder, SMALL)


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not a phantom"):
        write_phantom(tmp_path, SMALL)
    assert files(tmp_path) == {"thesis.txt": b"mine"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (write_phantom(tmp_path / "empty", SMALL) / "phantom.json").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_cases", 0),
        ("validation_cases", -1),
        ("test_cases", 1.5),
        ("slices_per_case", 0),
        ("size", (256,)),
        ("size", (256, 0)),
        ("noise", -0.1),
        ("noise", float("nan")),
        ("seed", -1),
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        PhantomSpec(**{field: value})
