"""Use a trained model: images and NIfTI files to codes and back, each on its own grid and scale of intensities."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from vqvae_jax import metrics
from vqvae_jax.coding import prior_coder
from vqvae_jax.coding.encoded import EncodedImages, EncodedNifti
from vqvae_jax.config import Config
from vqvae_jax.data import grid, intensity, nifti, nifti_write, slice_axes
from vqvae_jax.errors import CheckpointError, DataError
from vqvae_jax.inference import prior
from vqvae_jax.inference.effort import DESCENTS, Chooser
from vqvae_jax.models.fingerprint import fingerprint
from vqvae_jax.models.prior_integers import PriorProgram
from vqvae_jax.models.vqvae import VQVAE
from vqvae_jax.runtime import compilation, runs
from vqvae_jax.training import checkpoint
from vqvae_jax.training.state import Variables

CPU_PIXELS_AT_ONCE, DEVICE_PIXELS_AT_ONCE = 2**17, 2**20
"""Of the images that go through the model together."""


@dataclasses.dataclass(frozen=True, eq=False)
class NiftiResult:
    """How well a file was reconstructed: SSIM and PSNR (dB) of each slice, in [0, 1] scale as evaluation takes them:
    of the model's image, before it is rounded to the file's number type.

    ``slice_axis``, ``axis_reason`` and ``axis_doubt`` are those of ``EncodedNifti``.
    """

    ssim_per_slice: np.ndarray
    psnr_per_slice: np.ndarray
    slice_axis: int | None
    axis_reason: str
    axis_doubt: str = ""

    @property
    def ssim(self) -> float:
        """Mean over the slices."""
        return float(np.mean(self.ssim_per_slice))

    @property
    def psnr(self) -> float:
        """Mean over the slices, dB; inf if one is exact."""
        return float(np.mean(self.psnr_per_slice))


def load(run_dir: str | Path, which: checkpoint.Which = "best") -> "TrainedModel":
    """A trained model, ready to use.

    Args:
      run_dir: a folder that scripts/train.py wrote.
      which: the best checkpoint by validation SSIM, or the newest.

    Raises:
      CheckpointError, ConfigError: there is no run, or it cannot be read.

    Example:
      >>> import vqvae_jax
      >>> model = vqvae_jax.load("runs/demo")
      >>> model.reconstruct(np.zeros((45, 23))).shape
      (45, 23)
    """
    run_dir = Path(run_dir)
    config = runs.load_config(run_dir)
    return TrainedModel(config, checkpoint.load_variables(run_dir, config, which), run_dir)


class TrainedModel:
    """A trained model for images of any size and any scale of intensities; ``load`` makes one from a run's folder.

    Each image is scaled to [0, 1] between two percentiles of its intensities (``config.data.scale_percentiles``)
    and put on a grid: padded about its centre with 0, as in training, to the run's ``image_size`` or, where the image
    is larger, to the next multiple of the downsampling; nothing is cut off. A run trained with ``fit`` "resize"
    resizes instead. All of it is undone on the way back.

    The model's time grows with the square of an image's pixels where it has attention, its memory with the pixels.
    Images go through it a fixed number at a time, and on a CPU what is left over one by one. So it is compiled once or
    twice for each grid. May be shared by threads.

    Args:
      config: the run's configuration.
      variables: its model's variables.
      run_dir: where to look for a prior over its codes.

    Example:
      >>> images = np.random.default_rng(0).integers(0, 4096, (3, 45, 23))
      >>> encoded = model.encode(images)
      >>> encoded.indices.shape, encoded.ranges.shape
      ((3, 12, 6), (3, 2))
      >>> bool((model.decode(encoded) == model.reconstruct(images)).all())
      True
    """

    def __init__(self, config: Config, variables: Variables, run_dir: Path | None = None):
        self.config = config
        self._run_dir = run_dir
        self._variables = jax.device_put(variables, jax.local_devices()[0])
        model = VQVAE(config.model)
        self._to_indices = compilation.jit(functools.partial(model.apply, method="to_indices"))
        self._from_indices = compilation.jit(functools.partial(model.apply, method="from_indices"))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of what decoding depends on: the decoder, the codebook, and the settings of both.

        The same wherever the same model is loaded, however it was trained and whatever its encoder.
        """
        return fingerprint(self.config, self._variables)

    @functools.cached_property
    def prior(self) -> PriorProgram | None:
        """The prior over this model's codes, which scripts/train_prior.py trains; None where there is none.

        Raises:
          CheckpointError, ConfigError: it cannot be read.
        """
        return None if self._run_dir is None else prior.load(self._run_dir, self.config, self.fingerprint)

    @property
    def prior_doubt(self) -> str:
        """Why a prior that is in the run's folder is not used; empty if it is, or none is there."""
        return "" if self._run_dir is None else prior.doubt(self._run_dir, self.fingerprint)

    def bits(self, x: np.ndarray, *, volume: bool = False, progress: bool = False) -> np.ndarray:
        """How unlikely the codes of images are by the prior: float64 [N, h, w], bits for each code.

        Their sum over a slice is what its codes take in a .vqz file.

        Args:
          x: images as for ``reconstruct``.
          volume: they are consecutive slices of a volume. Each is then given those before, but for every 16th.
          progress: show a progress bar where it takes long.

        Raises:
          DataError: as for ``reconstruct``.
          CheckpointError: the run has no prior, or it cannot be read.
        """
        if self.prior is None:
            raise CheckpointError(f"{self._run_dir}: has no prior over its codes; train one by scripts/train_prior.py")
        indices = self.encode(x, progress=progress).indices
        return prior_coder.bits(indices, self.prior, alone=not volume)

    def codes_within(self, keep: np.ndarray) -> np.ndarray:
        """Which codes of a slice stand for pixels of a region alone: bool [h, w] of a region bool [H, W].

        What pads the slice to the model's size belongs to the region.
        """
        size = self._grid_of(keep.shape)
        outside = grid.fit(np.where(keep, 0.0, 1.0).astype(np.float32), size, self.config.data.fit)
        height, width = self.config.model.latent_size_of(size)
        factor = self.config.model.downsampling
        return outside.reshape(height, factor, width, factor).max(axis=(1, 3)) == 0

    def reconstruct(
        self, x: np.ndarray, *, intensity_range: tuple[float, float] | None = None, progress: bool = False
    ) -> np.ndarray:
        """What the model makes of images: ``decode(encode(x))``, bit for bit.

        Args:
          x: [H, W], [H, W, 1], [N, H, W] or [N, H, W, 1] of any real type.
          intensity_range: the intensities that become 0 and 1; by default percentiles of each image.
          progress: show a progress bar where it takes long.

        Returns:
          float32 of the shape and in the intensities of ``x``. An image of one value comes back as it is.

        Raises:
          DataError: ``x`` has another shape or type, is empty, or holds numbers that are not finite in float32.
        """
        return self.decode(self.encode(x, intensity_range=intensity_range, progress=progress), progress=progress)

    def encode(
        self,
        x: np.ndarray,
        *,
        intensity_range: tuple[float, float] | None = None,
        effort: int = 0,
        volume: bool = False,
        progress: bool = False,
    ) -> EncodedImages:
        """Codes of images. Arguments and errors as for ``reconstruct``, and:

        Args:
          x, intensity_range, progress: as for ``reconstruct``.
          effort: 0 takes the nearest codes; 1 to 3 choose codes of few bits and little error (`inference.effort`).
          volume: they are consecutive slices of a volume, for whose bits those before count.

        Raises:
          CheckpointError: ``effort`` above 0, and the run has no prior.
        """
        images = _checked(x)
        if intensity_range is None:
            limits = [intensity.intensity_range(image, self.config.data.scale_percentiles) for image in images]
        else:
            limits = [_checked_range(intensity_range)] * len(images)
        indices = self._codes(images, limits, effort, volume, progress)
        return EncodedImages(indices, tuple(np.shape(x)), np.array(limits, np.float32))

    def decode(self, encoded: EncodedImages, *, progress: bool = False) -> np.ndarray:
        """Images of codes: float32 of the shape and in the intensities that were encoded.

        Raises:
          DataError: the codes cannot be this model's.
        """
        count, height, width = self._checked_shape(encoded)
        images = np.empty((count, height, width), np.float32)
        for chosen, size in _batches(count, self._grid_of((height, width)), "Decoding", progress):
            batch = np.zeros((size, *encoded.indices.shape[1:]), np.int32)
            batch[: len(chosen)] = encoded.indices[chosen.start : chosen.stop]
            decoded = np.asarray(self._from_indices(self._variables, batch))[..., 0]
            for row, index in enumerate(chosen):
                own = grid.unfit(decoded[row], (height, width), self.config.data.fit)
                images[index] = intensity.unscale(own, *map(float, encoded.ranges[index]))
        return images.reshape(encoded.shape)

    def encode_nifti(
        self, path: str | Path, *, slice_axis: int | None = None, effort: int = 0, progress: bool = False
    ) -> EncodedNifti:
        """Codes of a NIfTI file's slices, scaled by percentiles of the whole file as in training.

        Args:
          path: a ``.nii`` or ``.nii.gz`` file.
          slice_axis: axis of the slices of a volume. By default the one in the anatomical direction of training's;
            where that is not known, what the header's ``dim_info`` names, else the one whose spacing stands out.
          effort: as for ``encode``.
          progress: show a progress bar where it takes long.

        Raises:
          DataError: the file cannot be read, or its voxels are RGB or complex.
          CheckpointError: ``effort`` above 0, and the run has no prior.
        """
        return self._encode_nifti(Path(path), slice_axis, effort, progress)[0]

    def decode_nifti(
        self, encoded: EncodedNifti, path_out: str | Path, *, overwrite: bool = False, progress: bool = False
    ) -> None:
        """Writes the file that was encoded, with its header as it was and the model's intensities.

        Args:
          encoded: from ``encode_nifti``.
          path_out: a name that ends in ``.nii`` or ``.nii.gz``; written whole or not at all.
          overwrite: replace a file that is there.
          progress: show a progress bar where it takes long.

        Raises:
          DataError: the codes cannot be this model's, or the file cannot be written.
        """
        path_out = Path(path_out)
        nifti_write.check_target(path_out, overwrite=overwrite)
        voxels = _stacked(self.decode(encoded.images, progress=progress), encoded)
        nifti_write.write(path_out, voxels, encoded.header, overwrite=overwrite)

    def reconstruct_nifti(
        self,
        path_in: str | Path,
        path_out: str | Path,
        *,
        slice_axis: int | None = None,
        difference: str | Path | None = None,
        overwrite: bool = False,
        progress: bool = False,
    ) -> NiftiResult:
        """Writes what the model makes of a NIfTI file: ``decode_nifti`` of ``encode_nifti``, whose arguments it has.

        The output has the file's header byte for byte (shape, affine, units, number type, scaling); integers are
        rounded. ``difference`` names a file for reconstruction less original: float32, in the file's intensities,
        before that rounding.

        Raises:
          DataError: the file cannot be read, its voxels are RGB or complex, or an output cannot be written.
        """
        path_in, path_out = Path(path_in), Path(path_out)
        outputs = [path_out] if difference is None else [path_out, Path(difference)]
        _check_outputs(path_in, outputs, overwrite)
        encoded, originals = self._encode_nifti(path_in, slice_axis, 0, progress)
        images = self.decode(encoded.images, progress=progress)
        ssim, psnr = _similarities(images, originals, encoded.images.ranges)
        nifti_write.write(path_out, _stacked(images, encoded), encoded.header, overwrite=overwrite)
        if difference is not None:
            header = nifti_write.float32_header(encoded.header)
            nifti_write.write(Path(difference), _stacked(images - originals, encoded), header, overwrite=overwrite)
        return NiftiResult(ssim, psnr, encoded.slice_axis, encoded.axis_reason, encoded.axis_doubt)

    def _encode_nifti(
        self, path: Path, slice_axis: int | None, effort: int, progress: bool
    ) -> tuple[EncodedNifti, np.ndarray]:
        """The file's codes, and its slices [N, H, W]."""
        try:
            volume = nifti.read(path, nan=self.config.data.nan)
            nifti_write.check_writable(volume.header)
            cut = self._cut(volume, slice_axis)
            images = np.stack([piece.pixels for piece in nifti.slices(volume, -1 if cut.axis is None else cut.axis)])
        except DataError as error:
            raise DataError(f"{path} {error}") from error
        limits = [intensity.intensity_range(volume.voxels, self.config.data.scale_percentiles)] * len(images)
        indices = self._codes(images, limits, effort, cut.axis is not None, progress)
        encoded = EncodedImages(indices, images.shape, np.array(limits, np.float32))
        return EncodedNifti(encoded, volume.header, cut.axis, cut.reason, cut.doubt), images

    def _cut(self, volume: nifti.Volume, asked: int | None) -> slice_axes.Cut:
        """How a file is cut into slices: as asked, else along the direction of training, else by its header."""
        trained = self.config.data
        header = nifti.parse_header(nifti.header_of(volume.header))
        if asked is None and trained.slice_direction is None:
            asked = trained.slice_axis
        return slice_axes.choose(header, asked, trained.slice_direction)

    def _codes(
        self, images: np.ndarray, limits: list[tuple[float, float]], effort: int, volume: bool, progress: bool
    ) -> np.ndarray:
        """Indices [N, h, w] of images [N, H, W], the nearest or chosen with effort."""
        if effort not in range(len(DESCENTS)):
            raise DataError(f"effort is {effort}; expected 0 to {len(DESCENTS) - 1}")
        if not effort:
            return self._indices(images, limits, progress)
        if self.prior is None:
            raise CheckpointError(
                f"{self._run_dir}: has no prior over its codes, by which an effort above 0 chooses them; train one by "
                "scripts/train_prior.py"
            )
        size = self._grid_of(images.shape[1:])
        found: list[np.ndarray] = []
        rows = zip(images, limits, strict=True)
        bar = tqdm.tqdm(rows, "Choosing codes", len(images), leave=False, delay=1, disable=None if progress else True)
        for number, (image, limit) in enumerate(bar):
            fitted = grid.fit(intensity.scale(image, *limit), size, self.config.data.fit)[..., None]
            first = number // prior_coder.GROUP * prior_coder.GROUP if volume else number
            found.append(self._chooser.choose(fitted, found[first:][::-1], effort))
        return np.stack(found)

    @functools.cached_property
    def _chooser(self) -> Chooser:
        return Chooser(self.config, self._variables, self.prior)

    def _indices(self, images: np.ndarray, limits: list[tuple[float, float]], progress: bool) -> np.ndarray:
        """Indices [N, h, w] of images [N, H, W]."""
        size = self._grid_of(images.shape[1:])
        indices = np.empty((len(images), *self.config.model.latent_size_of(size)), np.int32)
        for chosen, at_once in _batches(len(images), size, "Encoding", progress):
            batch = np.zeros((at_once, *size, 1), np.float32)
            for row, index in enumerate(chosen):
                scaled = intensity.scale(images[index], *limits[index])
                batch[row, ..., 0] = grid.fit(scaled, size, self.config.data.fit)
            found = np.asarray(self._to_indices(self._variables, batch))
            indices[chosen.start : chosen.stop] = found[: len(chosen)]
        return indices

    def _grid_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what the model is given for images of this shape."""
        least, multiple = self.config.model.image_size, self.config.model.downsampling
        if self.config.data.fit == "resize":
            return least
        return tuple(max(low, -(-side // multiple) * multiple) for side, low in zip(shape, least, strict=True))

    def _checked_shape(self, encoded: EncodedImages) -> tuple[int, int, int]:
        """Number, height and width of the images that were encoded. Raises DataError where they cannot be ours."""
        count, height, width = _three(encoded.shape)
        ranges, indices, most = encoded.ranges, encoded.indices, self.config.model.num_embeddings
        if ranges.shape != (count, 2) or not (np.abs(ranges) <= nifti.MAX_INTENSITY).all():
            raise DataError(f"ranges of shape {ranges.shape} are not two finite numbers for each of {count} images")
        expected = (count, *self.config.model.latent_size_of(self._grid_of((height, width))))
        if indices.shape != expected:
            raise DataError(
                f"codes of shape {indices.shape} where this model has {expected} for {count} x {height} x {width}"
            )
        if indices.min() < 0 or indices.max() >= most:
            raise DataError(f"codes beyond this model's {most}; use the model that encoded them")
        return count, height, width


def _check_outputs(path_in: Path, outputs: list[Path], overwrite: bool) -> None:
    """Raises DataError, before any work, where an output may not be written."""
    for path in outputs:
        nifti_write.check_target(path, overwrite=overwrite)
        if path.exists() and path_in.exists() and os.path.samefile(path_in, path):
            raise DataError(f"{path}: is the input itself; choose another name for the output")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise DataError(f"{outputs[0]}: is also the file for the difference; choose another name for one")


def _stacked(images: np.ndarray, encoded: EncodedNifti) -> np.ndarray:
    """Slices [N, H, W] as the voxels of their file. Raises DataError where its header is one of other voxels."""
    voxels = images[0] if encoded.slice_axis is None else np.stack(images, axis=encoded.slice_axis)
    shape = nifti_write.stored_shape(encoded.header)
    kept = shape if voxels.ndim == 2 else shape[:3]
    if tuple(side for side in kept if side > 1) != tuple(side for side in voxels.shape if side > 1):
        raise DataError(f"slices of shape {images.shape} are not those of a file of shape {shape}")
    return voxels.reshape(shape)


def _similarities(images: np.ndarray, originals: np.ndarray, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and PSNR of each slice in [0, 1] scale."""
    scaled = [
        [intensity.scale(x, low, high) for x, (low, high) in zip(arrays, ranges.astype(float), strict=True)]
        for arrays in (images, originals)
    ]
    found = metrics.measure(*scaled)
    return found["ssim"], found["psnr"]


def _batches(count: int, grid: tuple[int, int], label: str, progress: bool) -> Iterator[tuple[range, int]]:
    """Ranges that cover ``count`` images, each with the number of images that its program takes.

    They depend on the count and the grid alone, so that decoding does as encoding did. The bar shows after a second, on
    a terminal.
    """
    on_cpu = jax.default_backend() == "cpu"
    full = max(1, (CPU_PIXELS_AT_ONCE if on_cpu else DEVICE_PIXELS_AT_ONCE) // math.prod(grid))
    with tqdm.tqdm(
        total=count, desc=label, unit="image", leave=False, delay=1, disable=None if progress else True
    ) as bar:
        start = 0
        while start < count:
            size = 1 if on_cpu and count - start < full else full
            chosen = range(start, min(count, start + size))
            yield chosen, size
            bar.update(len(chosen))
            start += size


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """N, H, W of an array of images. Raises DataError where it is none."""
    given = tuple(shape)
    if len(shape) in (3, 4) and shape[-1] == 1:  # the channel: an image is never one pixel wide
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3 or 0 in shape or min(shape[1:]) < nifti.MIN_SIDE:
        raise DataError(
            f"images of shape {given}; expected [H, W], [H, W, 1], [N, H, W] or [N, H, W, 1], with N at least 1, and H "
            f"and W at least {nifti.MIN_SIDE}"
        )
    return tuple(map(int, shape))


def _checked(x: np.ndarray) -> np.ndarray:
    """Images as float32 [N, H, W]."""
    x = np.asarray(x)
    if x.dtype != bool and not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise DataError(f"images of type {x.dtype}; expected real numbers")
    shape = _three(x.shape)
    with np.errstate(over="ignore"):
        images = x.astype(np.float32).reshape(shape)
    bad = images.size - int((np.abs(images) <= nifti.MAX_INTENSITY).sum())
    if bad:
        raise DataError(f"images with {bad} pixels that are NaN, infinite or beyond {nifti.MAX_INTENSITY:g}")
    return images


def _checked_range(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = map(float, limits)
    if not -nifti.MAX_INTENSITY <= low < high <= nifti.MAX_INTENSITY or np.float32(low) == np.float32(high):
        raise DataError(f"intensity_range is {limits}; expected two finite rising numbers")
    return low, high
