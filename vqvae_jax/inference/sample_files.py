"""Samples as files: NIfTI, and one picture of them all."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from vqvae_jax.data import nifti, nifti_write
from vqvae_jax.errors import DataError
from vqvae_jax.evaluation import pictures
from vqvae_jax.inference import samples
from vqvae_jax.inference.trained_model import TrainedModel

PICTURE = "samples.png"
VOLUME = "volume.nii.gz"


def write_slices(model: TrainedModel, folder: Path, count: int, *, overwrite: bool = False, **options: Any) -> list:
    """Writes ``samples.sample`` as float32 slices in [0, 1]. Returns the paths of the NIfTI files.

    Raises:
      DataError: a file exists, and ``overwrite`` is not set, or it cannot be written.
      CheckpointError, ConfigError: as for ``samples.sample``.
    """
    paths = _free([folder / name for name in samples.named(count)], folder, overwrite)
    images = samples.sample(model, count, progress=True, **options)
    for path, image in zip(paths, images, strict=True):
        nifti_write.write(path, image, _header(image.shape), overwrite=overwrite)
    pictures.draw_grid(folder / PICTURE, images)
    return paths


def write_volume(model: TrainedModel, folder: Path, slices: int, *, overwrite: bool = False, **options: Any) -> list:
    """Writes ``samples.sample_volume`` as one float32 volume, slices along the third axis. As ``write_slices``."""
    paths = _free([folder / VOLUME], folder, overwrite)
    images = samples.sample_volume(model, slices, **options)
    voxels = np.moveaxis(images, 0, -1)
    nifti_write.write(paths[0], voxels, _header(voxels.shape), overwrite=overwrite)
    pictures.draw_grid(folder / PICTURE, images)
    return paths


def write_inpainted(
    model: TrainedModel, folder: Path, like: Path, mask: Path, count: int, *, overwrite: bool = False, **options: Any
) -> list:
    """Writes ``samples.inpaint`` of a NIfTI slice, with its header, as ``write_slices`` writes samples.

    Raises:
      DataError: a file cannot be read, or is no slice; or as for ``write_slices``.
    """
    paths = _free([folder / name for name in samples.named(count)], folder, overwrite)
    volume, image = _slice(like)
    _, keep = _slice(mask)
    try:
        made = samples.inpaint(model, image, keep != 0, count, **options)
    except DataError as error:
        raise DataError(f"{mask}: {error}") from error
    shape = nifti_write.stored_shape(volume.header)
    for path, each in zip(paths, made, strict=True):
        nifti_write.write(path, each.reshape(shape), volume.header, overwrite=overwrite)
    low, high = np.percentile(image, model.config.data.scale_percentiles)
    pictures.draw_grid(folder / PICTURE, (np.concatenate([image[None], made]) - low) / max(high - low, 1e-12))
    return paths


def _free(paths: list[Path], folder: Path, overwrite: bool) -> list[Path]:
    for path in paths:
        nifti_write.check_target(path, overwrite=overwrite)
    nifti_write.check_target(folder / PICTURE, overwrite=overwrite, suffixes=(".png",))
    return paths


def _slice(path: Path) -> tuple[nifti.Volume, np.ndarray]:
    try:
        volume = nifti.read(path)
        nifti_write.check_writable(volume.header)
        cut = nifti.slices(volume, -1)
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    if len(cut) != 1:
        raise DataError(f"{path} holds {len(cut)} slices; give a file with one")
    return volume, cut[0].pixels


def _header(shape: tuple[int, ...]) -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    header.set_sform(np.eye(4), code=0)
    header["vox_offset"] = 352
    return header.binaryblock + bytes(4)
