"""JPEG, JPEG 2000, WebP and AVIF by Pillow: what slices cost and look like over each codec's range of quality."""

import dataclasses
import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tqdm
from PIL import Image, features
from scipy.interpolate import PchipInterpolator

from vqvae_jax import metrics
from vqvae_jax.errors import ConfigError
from vqvae_jax.models import vgg16

LAYERS = ("relu3_3",)
"""Of VGG16, for the perceptual distance."""
METRICS = ("ssim", "psnr", "perceptual")
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Codec:
    """One format: its names here, in Pillow and among Pillow's features; what to save with, setting by setting."""

    name: str
    format: str
    feature: str
    effort: str
    sweep: tuple[dict[str, Any], ...]

    def encode(self, levels: np.ndarray, setting: dict[str, Any]) -> bytes:
        """A whole file of a grey image uint8 [H, W]."""
        file = io.BytesIO()
        Image.fromarray(levels).save(file, self.format, **setting)
        return file.getvalue()

    def smallest(self) -> int:
        """Bytes of a file of one black pixel: as good as nothing but headers."""
        return len(self.encode(np.zeros((1, 1), np.uint8), self.sweep[0]))


_QUALITIES = (1, 3, 5, 8, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90)
_JPEG2000_BITS = (0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1, 1.5, 2, 3)


def codecs(avif_speed: int) -> tuple[Codec, ...]:
    """The four, each set as is best for it at its rates.

    Args:
      avif_speed: from 10 to 0 libavif takes longer and gets better.

    Raises:
      ConfigError: this Pillow was built without one of them.
    """
    jpeg2000 = {"quality_mode": "rates", "irreversible": True, "no_jp2": True}
    found = (
        Codec("JPEG", "JPEG", "jpg", "optimised Huffman tables", _settings(_QUALITIES, optimize=True)),
        Codec(
            "JPEG 2000",
            "JPEG2000",
            "jpg_2000",
            "9/7 wavelet, bare codestream",
            tuple({**jpeg2000, "quality_layers": [8 / bits]} for bits in _JPEG2000_BITS),
        ),
        Codec("WebP", "WEBP", "webp", "lossy, method 6", _settings((0, *_QUALITIES), method=6)),
        Codec(
            "AVIF",
            "AVIF",
            "avif",
            f"4:0:0, speed {avif_speed}",
            _settings((0, *_QUALITIES), subsampling="4:0:0", speed=avif_speed),
        ),
    )
    if missing := [codec.name for codec in found if not features.check(codec.feature)]:
        raise ConfigError(f"this Pillow cannot write {', '.join(missing)}; install 11.3 or newer")
    return found


def _settings(qualities: Sequence[int], **options: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"quality": quality, **options} for quality in qualities)


def decode(file: bytes) -> np.ndarray:
    """The grey image uint8 [H, W] in a file."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("L"))


def curves(
    chosen: Sequence[Codec], images: Sequence[np.ndarray], vgg_variables: Any = None
) -> dict[str, dict[str, np.ndarray]]:
    """Rate and distortion of slices [H, W] in [0, 1], rounded to 8 bits for the codecs.

    Every setting is one point: the bits of all files over all pixels, and each metric's mean over the slices against
    the original before rounding.

    Returns:
      codec's name -> ``bits_per_pixel`` (rising), ``ssim``, ``psnr`` and ``perceptual`` (NaN without VGG16's
      variables, or where slices are too small for it), one value a setting.
    """
    pixels = sum(image.size for image in images)
    found = {codec.name: [defaultdict(list) for _ in codec.sweep] for codec in chosen}
    batches = list(_batches(images))
    bar = tqdm.tqdm(total=len(batches) * sum(map(len, found.values())), desc="Codecs", leave=False, disable=None)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, bar:
        for originals in batches:
            distances = _distances_to(originals, vgg_variables)
            for codec in chosen:
                for setting, point in zip(codec.sweep, found[codec.name], strict=True):
                    files = list(pool.map(lambda x, c=codec, s=setting: c.encode(x, s), _to_levels(originals)))
                    decoded = np.stack(list(pool.map(decode, files))).astype(np.float32) / 255
                    point["bits"] += [8 * len(file) for file in files]
                    for metric, values in metrics.measure(decoded, originals).items():
                        point[metric] += values.tolist()
                    point["perceptual"] += distances(decoded)
                    bar.update()
    result = {}
    for name, points in found.items():
        points.sort(key=lambda point: sum(point["bits"]))
        rates = {"bits_per_pixel": np.array([sum(point["bits"]) / pixels for point in points])}
        result[name] = rates | {metric: np.array([np.mean(point[metric]) for point in points]) for metric in METRICS}
    return result


def at_rate(curve: dict[str, np.ndarray], bits_per_pixel: float, metric: str) -> float:
    """A metric at a rate; NaN where the codec's files were all larger, or all smaller.

    By a monotone cubic over log2 of the rate: a straight line would cut below a curve that bends, to the codec's harm.
    """
    rates, values = curve["bits_per_pixel"], curve[metric]
    if not rates[0] <= bits_per_pixel <= rates[-1] or np.isnan(values).any():
        return math.nan
    distinct = np.unique(rates, return_index=True)[1]  # settings can coincide where slices are tiny
    return float(PchipInterpolator(np.log2(rates[distinct]), values[distinct])(np.log2(bits_per_pixel)))


def _to_levels(images: np.ndarray) -> np.ndarray:
    return np.round(images * 255).astype(np.uint8)


def _batches(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The images in arrays [N, H, W] of one shape each."""
    by_shape = defaultdict(list)
    for image in images:
        by_shape[image.shape].append(image)
    for same in by_shape.values():
        for start in range(0, len(same), _BATCH):
            yield np.stack(same[start : start + _BATCH])


def _distances_to(originals: np.ndarray, vgg_variables: Any) -> Callable[[np.ndarray], list[float]]:
    """A function of images, of their perceptual distances to these originals, whose features are computed once."""
    if vgg_variables is None or min(originals.shape[1:]) < vgg16.smallest_side(*LAYERS):
        return lambda images: [math.nan] * len(images)
    targets = [_features(vgg_variables, image) for image in originals]

    def distances(images: np.ndarray) -> list[float]:
        pairs = zip(images, targets, strict=True)
        found = [metrics.perceptual_distance(_features(vgg_variables, image), target) for image, target in pairs]
        return np.concatenate(found).tolist()

    return distances


@jax.jit
def _features(vgg_variables: Any, image: np.ndarray) -> dict[str, jax.Array]:
    return vgg16.VGG16(layers=LAYERS).apply(vgg_variables, image[None, ..., None])
