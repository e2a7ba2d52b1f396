"""A run's test slices as .vqz files, and AVIF at as many bytes: what the codes cost, beside a codec anyone has."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image, features

from vqvae_jax import metrics
from vqvae_jax.coding import vqz
from vqvae_jax.coding.encoded import EncodedImages, EncodedNifti
from vqvae_jax.data import volumes
from vqvae_jax.evaluation.evaluate import open_run
from vqvae_jax.inference.trained_model import TrainedModel, load

SPEED = 6
"""AVIF's default: from 10 to 0 it takes longer and gets better."""
SLICES = 64
"""About so many slices are compared, of whole volumes."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Bits a pixel of whole files and mean SSIM. Those of AVIF are None where it makes no files as small."""

    slices: int
    bits: float
    ssim: float
    avif_bits: float | None
    avif_ssim: float | None

    def __str__(self) -> str:
        ours = f"{self.slices} test slices as .vqz files: {self.bits:.4f} bits a pixel, SSIM {self.ssim:.4f}"
        if self.avif_bits is None:
            return f"{ours}; AVIF makes no files as small"
        return f"{ours}; AVIF in as many bytes: {self.avif_bits:.4f}, SSIM {self.avif_ssim:.4f}"


def open_volumes(
    run_dir: Path,
    split: str | None = "test",
    *,
    data: str | None = None,
    most: int | None = None,
    log: Callable[[str], None] = print,
) -> list[np.ndarray]:
    """A split's volumes float32 [N, H, W] in [0, 1]; with ``most``, a sample of them of about so many slices.

    Slices of another size in one volume are a volume of their own.

    Raises:
      CheckpointError, ConfigError, DataError: the run or its data cannot be read.
    """
    _, _, slices = open_run(run_dir, split, data=data, log=log)
    volume, numbers = volumes.of_slices(slices)
    count = int(volume.max()) + 1
    found: dict[int, list[np.ndarray]] = {}
    for number in np.random.default_rng(0).permutation(count) if most else range(count):
        if most and sum(len(part) for parts in found.values() for part in parts) >= most:
            break
        places = sorted(np.flatnonzero(volume == number), key=lambda place: numbers[place])
        images = [slices.sample(int(place)).pixels for place in places]
        sizes = {image.shape for image in images}
        found[int(number)] = [np.stack([image for image in images if image.shape == size]) for size in sorted(sizes)]
    return [volume for number in sorted(found) for volume in found[number]]


def file_of(indices: np.ndarray, size: tuple[int, int], model: TrainedModel) -> vqz.VqzFile:
    """A .vqz file of slices' codes [N, h, w], as of a NIfTI file of int16; a volume where they are several."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((*size, len(indices)) if len(indices) > 1 else size)
    header["vox_offset"] = 352
    ranges = np.tile(np.float32([3.5, 437.25]), (len(indices), 1))
    images = EncodedImages(indices, (len(indices), *size), ranges)
    encoded = EncodedNifti(images, header.binaryblock + bytes(4), 2 if len(indices) > 1 else None)
    return vqz.VqzFile(encoded, model.config.model.num_embeddings, model.fingerprint)


def compare(run_dir: Path) -> Comparison:
    """A run's test slices by its best checkpoint, and by AVIF with the highest quality that takes no more bytes.

    The .vqz files are one for each volume, the AVIF files one for each slice.
    """
    model = load(run_dir)
    images = open_volumes(run_dir, most=SLICES, log=lambda line: None)
    size, ssim = 0, []
    for volume in images:
        encoded = model.encode(volume, intensity_range=(0, 1))
        size += len(vqz.to_bytes(file_of(encoded.indices, volume.shape[1:], model), model.prior))
        ssim += metrics.measure(np.clip(model.decode(encoded), 0, 1), volume)["ssim"].tolist()
    pixels = sum(volume.size for volume in images)
    ours = (len(ssim), 8 * size / pixels, float(np.mean(ssim)))
    best = _best_avif(images, size) if features.check("avif") else None
    if best is None:
        return Comparison(*ours, None, None)
    decoded = [np.stack([_decoded(file) for file in files]) for files in best]
    found = [metrics.measure(*pair)["ssim"] for pair in zip(decoded, images, strict=True)]
    return Comparison(*ours, 8 * _total(best) / pixels, float(np.mean(np.concatenate(found))))


def _best_avif(images: Sequence[np.ndarray], most: int) -> list[list[bytes]] | None:
    """Files of the slices at the highest quality with ``most`` bytes or fewer; None where there is none."""
    low, high, best = -1, 100, None
    while high - low > 1:
        quality = (low + high) // 2
        files = [[_encoded(image, quality) for image in volume] for volume in images]
        if _total(files) <= most:
            low, best = quality, files
        else:
            high = quality
    return best


def _total(files: Sequence[Sequence[bytes]]) -> int:
    return sum(len(file) for some in files for file in some)


def _encoded(image: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    levels = Image.fromarray(np.round(image * 255).astype(np.uint8))
    levels.save(file, "AVIF", quality=quality, speed=SPEED, subsampling="4:0:0")
    return file.getvalue()


def _decoded(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("L"), np.float32) / 255
