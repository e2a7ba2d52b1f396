"""Codes as the .vqz file that a user would have, without a NIfTI file of the slices."""

import nibabel
import numpy as np

from vqvae_jax.coding import vqz
from vqvae_jax.coding.encoded import EncodedImages, EncodedNifti
from vqvae_jax.inference.trained_model import TrainedModel


def file_of(indices: np.ndarray, size: tuple[int, int], model: TrainedModel) -> vqz.VqzFile:
    """A .vqz file of slices' codes [N, h, w]; a volume of int16 where they are several."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((*size, len(indices)) if len(indices) > 1 else size)
    header["vox_offset"] = 352
    ranges = np.tile(np.float32([3.5, 437.25]), (len(indices), 1))
    images = EncodedImages(indices, (len(indices), *size), ranges)
    encoded = EncodedNifti(images, header.binaryblock + bytes(4), 2 if len(indices) > 1 else None)
    return vqz.VqzFile(encoded, model.config.model.num_embeddings, model.fingerprint)


def content_of(indices: np.ndarray, size: tuple[int, int], model: TrainedModel) -> bytes:
    """The bytes of ``file_of`` as scripts/encode.py writes them: by the prior, or simply where that takes fewer."""
    return vqz.to_bytes(file_of(indices, size, model), model.prior)
