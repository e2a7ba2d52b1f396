"""NIfTI files to .vqz files and back with a trained model, and how much smaller that makes them."""

import dataclasses
import gzip
import math
from pathlib import Path

from vqvae_jax.coding import entropy, vqz
from vqvae_jax.data import nifti, nifti_write
from vqvae_jax.errors import DataError
from vqvae_jax.inference.trained_model import TrainedModel

SUFFIXES = (".vqz",)
GZIP_LEVEL = 6
"""gzip's default, of the voxels that a .vqz file is compared with."""


@dataclasses.dataclass(frozen=True)
class Compression:
    """Sizes in bytes: of the .vqz file, of the NIfTI file as it lay on disk, and of its voxels, as stored, by gzip.

    ``by_prior``: the run's prior coded it, not the simple coder.
    """

    size: int
    input_size: int
    gzip_size: int
    voxels: int
    slice_axis: int | None
    axis_reason: str
    axis_doubt: str = ""
    by_prior: bool = False

    @property
    def bits_per_pixel(self) -> float:
        """Of the whole .vqz file, for each voxel."""
        return 8 * self.size / self.voxels

    def __str__(self) -> str:
        axis = "" if self.slice_axis is None else f", slices along axis {self.slice_axis} ({self.axis_reason})"
        return (
            f"{self.bits_per_pixel:.4f} bits per pixel ({self.size} bytes), {self.input_size / self.size:.1f} times "
            f"smaller than the file, {self.gzip_size / self.size:.1f} times smaller than its voxels by gzip"
            f"{', coded by the prior' if self.by_prior else ''}{axis}"
        )


def encode_file(
    model: TrainedModel,
    path: Path,
    path_out: Path,
    *,
    slice_axis: int | None = None,
    effort: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> Compression:
    """Writes a NIfTI file's codes as a .vqz file, whole or not at all; by the run's prior where it has one.

    ``effort`` is that of `TrainedModel.encode`.

    Raises:
      CheckpointError: ``effort`` above 0, and the run has no prior.
      DataError: the file cannot be read; or the output exists, and ``overwrite`` is not set, or cannot be written; or
        the model has more codes than a .vqz file may have.
    """
    nifti_write.check_target(path_out, overwrite=overwrite, suffixes=SUFFIXES)
    num_embeddings = model.config.model.num_embeddings
    if num_embeddings > entropy.MAX_CODES:
        raise DataError(
            f"{path_out}: cannot hold the model's {num_embeddings} kinds of codes; use a model with "
            f"{entropy.MAX_CODES} or fewer"
        )
    encoded = model.encode_nifti(path, slice_axis=slice_axis, effort=effort, progress=progress)
    stored = nifti.read_bytes(path)[len(encoded.header) :]
    size = vqz.save(path_out, vqz.VqzFile(encoded, num_embeddings, model.fingerprint), model.prior)
    return Compression(
        size=size,
        input_size=path.stat().st_size,
        gzip_size=len(gzip.compress(stored, GZIP_LEVEL)),
        voxels=math.prod(encoded.images.shape),
        slice_axis=encoded.slice_axis,
        axis_reason=encoded.axis_reason,
        axis_doubt=encoded.axis_doubt,
        by_prior=vqz.is_by_prior(path_out),
    )


def decode_file(
    model: TrainedModel,
    path: Path,
    path_out: Path,
    *,
    force: bool = False,
    salvage: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[int, ...]:
    """Writes the NIfTI file that a .vqz file holds, whole or not at all: the voxels that ``reconstruct_nifti`` gives.

    Args:
      model: the one that encoded it; with ``force`` any with the same number of codes, on grids of the same size.
      path: a .vqz file.
      path_out: a name that ends in ``.nii`` or ``.nii.gz``.
      force: decode with another model than the one that encoded: the image will be another.
      salvage: take a damaged file that a prior coded; slices that are lost are black.
      overwrite: replace a file that is there.
      progress: show a progress bar where it takes long.

    Returns:
      The numbers of the slices that are lost.

    Raises:
      DataError: the file cannot be read, or is of another model; or the output exists or cannot be written.
    """
    nifti_write.check_target(path_out, overwrite=overwrite)
    file = vqz.load(path, model.prior, salvage=salvage)
    if file.fingerprint != model.fingerprint and not force:
        raise DataError(
            f"{path}: was encoded by another model ({file.fingerprint[:12]}; this one is {model.fingerprint[:12]}); "
            "give that model's --workdir, or --force to decode nevertheless, to another image"
        )
    expected = model.config.model.num_embeddings
    if file.num_embeddings != expected:
        raise DataError(
            f"{path}: has {file.num_embeddings} kinds of codes, the model {expected}; use the model that encoded it"
        )
    encoded = file.encoded
    if file.lost:
        ranges = encoded.images.ranges.copy()
        ranges[list(file.lost), 1] = ranges[list(file.lost), 0]
        encoded = dataclasses.replace(encoded, images=dataclasses.replace(encoded.images, ranges=ranges))
    try:
        model.decode_nifti(encoded, path_out, overwrite=overwrite, progress=progress)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return file.lost
