"""What a run's files take beside AVIF: whole files, and no AVIF that takes more."""

import io

import nibabel
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from vqvae_jax.inference import beside_avif, vqz_files
from vqvae_jax.inference.trained_model import load


@pytest.fixture(scope="module")
def compared(tiny_run):
    return tiny_run[0] / "runs/tiny", beside_avif.compare(tiny_run[0] / "runs/tiny")


def test_bits_are_those_of_the_files_that_encode_would_write(compared, tmp_path):
    run_dir, found = compared
    model, size = load(run_dir), 0
    images = beside_avif.open_volumes(run_dir)
    for number, volume in enumerate(images):
        stored = np.moveaxis(np.round(volume * 4000).astype(np.int16), 0, 2)
        nibabel.save(nibabel.Nifti1Image(stored, np.diag([2, 2, 6, 1])), tmp_path / f"{number}.nii")
        size += vqz_files.encode_file(model, tmp_path / f"{number}.nii", tmp_path / f"{number}.vqz").size
    assert found.slices == sum(map(len, images))
    assert found.bits == pytest.approx(8 * size / sum(volume.size for volume in images), rel=0.1)


def test_avif_has_the_best_quality_that_takes_no_more_bytes(compared):
    run_dir, found = compared
    images = np.concatenate(beside_avif.open_volumes(run_dir))

    def files(quality):
        for image in images:
            file = io.BytesIO()
            levels = Image.fromarray(np.round(image * 255).astype(np.uint8))
            levels.save(file, "AVIF", quality=quality, speed=6, subsampling="4:0:0")
            yield file

    bits = {quality: 8 * sum(file.getbuffer().nbytes for file in files(quality)) / images.size for quality in (0, 50)}
    if bits[0] > found.bits:  # a header is more than these small slices' codes
        assert found.avif_bits is None and "no files as small" in str(found)
    else:
        assert found.avif_bits <= found.bits


def test_the_best_avif_is_scored_as_scikit_image_does():
    y, x = np.mgrid[:64, :64]
    images = [np.float32([0.5 + 0.4 * np.sin(x / 5) * np.cos(y / 7), x / 63])]
    files = beside_avif._best_avif(images, 1200)
    assert sum(len(file) for file in files[0]) <= 1200
    larger = beside_avif._best_avif(images, 4000)
    scores = [
        np.mean(
            [
                structural_similarity(beside_avif._decoded(file).astype(float), image.astype(float), data_range=1)
                for file, image in zip(found[0], images[0], strict=True)
            ]
        )
        for found in (files, larger)
    ]
    assert 0.5 < scores[0] < scores[1]
    assert beside_avif._best_avif(images, 100) is None
