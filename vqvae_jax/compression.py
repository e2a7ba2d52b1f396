"""NIfTI files to .vqz files and back with a trained model, and how much smaller that makes them."""

import dataclasses
import gzip
from pathlib import Path

from vqvae_jax import codes, entropy
from vqvae_jax.data import nifti, nifti_write
from vqvae_jax.errors import DataError
from vqvae_jax.inference import NiftiCodes, Run

SUFFIXES = (".vqz",)
GZIP_LEVEL = 6
"""gzip's default, of the voxels that a .vqz file is compared with."""


@dataclasses.dataclass(frozen=True)
class Compression:
    """Sizes in bytes: of the .vqz file, of the NIfTI file as it lay on disk, and of its voxels, as stored, by gzip."""

    size: int
    input_size: int
    gzip_size: int
    voxels: int
    slice_axis: int | None
    axis_reason: str

    @property
    def bits_per_pixel(self) -> float:
        """Of the whole .vqz file, for each voxel."""
        return 8 * self.size / self.voxels

    def __str__(self) -> str:
        axis = "" if self.slice_axis is None else f", slices along axis {self.slice_axis} ({self.axis_reason})"
        return (
            f"{self.bits_per_pixel:.4f} bits per pixel ({self.size} bytes), {self.input_size / self.size:.1f} times "
            f"smaller than the file, {self.gzip_size / self.size:.1f} times smaller than its voxels by gzip{axis}"
        )


def encode_file(
    run: Run,
    path: Path,
    path_out: Path,
    *,
    slice_axis: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Compression:
    """Writes a NIfTI file's codes as a .vqz file, whole or not at all.

    Raises:
      DataError: the file cannot be read; or the output exists, and ``overwrite`` is not set, or cannot be written; or
        the model has more codes than a .vqz file may have.
    """
    nifti_write.check_target(path_out, overwrite=overwrite, suffixes=SUFFIXES)
    if run.config.model.num_codes > entropy.MAX_CODES:
        raise DataError(
            f"{path_out}: cannot hold the model's {run.config.model.num_codes} kinds of codes; use a model with "
            f"{entropy.MAX_CODES} or fewer"
        )
    encoded = run.encode_nifti(path, slice_axis=slice_axis, progress=progress)
    num_codes = (run.config.model.num_codes,) * len(encoded.codes.levels)
    stored = nifti.read_bytes(path)[len(encoded.header) :]
    size = codes.save(path_out, codes.CodeFile(encoded, num_codes, run.fingerprint))
    return Compression(
        size=size,
        input_size=path.stat().st_size,
        gzip_size=len(gzip.compress(stored, GZIP_LEVEL)),
        voxels=_count(encoded),
        slice_axis=encoded.slice_axis,
        axis_reason=encoded.axis_reason,
    )


def decode_file(
    run: Run, path: Path, path_out: Path, *, force: bool = False, overwrite: bool = False, progress: bool = False
) -> None:
    """Writes the NIfTI file that a .vqz file holds, whole or not at all: the voxels that ``reconstruct_nifti`` gives.

    Args:
      run: the model that encoded it; with ``force`` any with the same number of codes, on grids of the same size.
      path: a .vqz file.
      path_out: a name that ends in ``.nii`` or ``.nii.gz``.
      force: decode with another model than the one that encoded: the image will be another.
      overwrite: replace a file that is there.
      progress: show a progress bar where it takes long.

    Raises:
      DataError: the file cannot be read, or is of another model; or the output exists or cannot be written.
    """
    nifti_write.check_target(path_out, overwrite=overwrite)
    file = codes.load(path)
    if file.fingerprint != run.fingerprint and not force:
        raise DataError(
            f"{path}: was encoded by another model ({file.fingerprint[:12]}; this one is {run.fingerprint[:12]}); "
            "give that model's --workdir, or --force to decode nevertheless, to another image"
        )
    expected = (run.config.model.num_codes,) * len(file.num_codes)
    if file.num_codes != expected:
        raise DataError(
            f"{path}: has {file.num_codes} kinds of codes, the model {expected}; use the model that encoded it"
        )
    try:
        run.decode_nifti(file.codes, path_out, overwrite=overwrite, progress=progress)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _count(encoded: NiftiCodes) -> int:
    count, height, width = encoded.codes.shape
    return count * height * width
