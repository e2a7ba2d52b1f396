"""JPEG, JPEG 2000, WebP, JPEG XL and AVIF by Pillow: what slices cost and look like over each codec's qualities."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, features
from scipy.interpolate import PchipInterpolator

from vqvae_jax import metrics
from vqvae_jax.errors import ConfigError
from vqvae_jax.runtime.files import write_whole

with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401 - gives Pillow the format JXL

METRICS = ("ssim", "psnr")
PAYLOAD = ", no header"
"""What a codec's name ends in where only the bytes of its compressed data are counted."""
_QUALITIES = (5, 15, 25, 35, 45, 55, 65, 75)
_AVIF_QUALITIES = (2, 8, 14, 20, 26, 32, 38, 45, 55)
_JPEG2000_BITS = (0.08, 0.12, 0.2, 0.3, 0.4, 0.55, 0.7, 1)
Curve = dict[str, np.ndarray]
"""``bits_per_pixel`` (rising), ``ssim`` and ``psnr``, one value a setting."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """One format: its name here and in Pillow; what to save with, setting by setting.

    ``sequence``: a volume's slices are one file, each predicted from those before; else each is a file.
    """

    name: str
    format: str
    sweep: tuple[dict[str, Any], ...]
    sequence: bool = False

    def encode(self, levels: np.ndarray, setting: dict[str, Any]) -> bytes:
        """A whole file of grey images uint8 [N, H, W]; N is 1 but for a sequence."""
        file = io.BytesIO()
        first, *others = map(Image.fromarray, levels)
        more = {"save_all": True, "append_images": others} if self.sequence and others else {}
        first.save(file, self.format, **setting, **more)
        return file.getvalue()


def codecs(avif_speeds: Sequence[int]) -> tuple[Codec, ...]:
    """All of them; JPEG XL where the package pillow-jxl-plugin is there.

    Args:
      avif_speeds: from 10 to 0 libavif takes longer and gets better. Sequences are made at the last of them.

    Raises:
      ConfigError: this Pillow was built without one of them.
    """
    if missing := [name for name in ("jpg", "jpg_2000", "webp", "avif") if not features.check(name)]:
        raise ConfigError(f"this Pillow cannot write {', '.join(missing)}; install 11.3 or newer")
    jpeg2000 = {"quality_mode": "rates", "irreversible": True, "no_jp2": True}
    found = [
        Codec("JPEG", "JPEG", _settings((1, *_QUALITIES), optimize=True)),
        Codec("JPEG 2000", "JPEG2000", tuple({**jpeg2000, "quality_layers": [8 / bits]} for bits in _JPEG2000_BITS)),
        Codec("WebP", "WEBP", _settings((0, *_QUALITIES), method=6)),
    ]
    if "JXL" in Image.SAVE:
        found.append(Codec("JPEG XL", "JXL", _settings((1, *_QUALITIES), effort=9)))
    for speed in avif_speeds:
        found.append(Codec(f"AVIF speed {speed}", "AVIF", _settings(_AVIF_QUALITIES, subsampling="4:0:0", speed=speed)))
    last = found[-1]
    return (*found, dataclasses.replace(last, name=f"AVIF sequence speed {avif_speeds[-1]}", sequence=True))


def _settings(qualities: Sequence[int], **options: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"quality": quality, **options} for quality in qualities)


def decode(file: bytes) -> np.ndarray:
    """The grey images uint8 [N, H, W] in a file."""
    with Image.open(io.BytesIO(file)) as image:
        return np.stack([np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(image)])


def payload(file: bytes) -> int:
    """Bytes of the compressed data in an AVIF file: what its ``mdat`` boxes hold (ISO/IEC 14496-12, section 4.2)."""
    place = found = 0
    while place < len(file):
        size = int.from_bytes(file[place : place + 4], "big") or len(file) - place  # 0: to the end
        header = 8
        if size == 1:
            size, header = int.from_bytes(file[place + 8 : place + 16], "big"), 16
        if file[place + 4 : place + 8] == b"mdat":
            found += size - header
        place += size
    return found


def curves(
    chosen: Sequence[Codec], volumes: Sequence[np.ndarray], say: Callable[[str], None], kept: Path
) -> dict[str, Curve]:
    """Rate and distortion of volumes float32 [N, H, W] in [0, 1], rounded to 8 bits for the codecs.

    Every setting is one point: the bits of all files over all pixels, and each metric's mean over the slices against
    the original before rounding.

    Args:
      chosen: the codecs.
      volumes: the slices.
      say: is given a line for each codec and setting.
      kept: a JSON file of what was found, in which the same codec and slices are looked up first.

    Returns:
      codec's name -> its curve; of AVIF also name + PAYLOAD.
    """
    levels = [np.round(volume * 255).astype(np.uint8) for volume in volumes]
    digest = hashlib.sha256(b"".join(volume.tobytes() for volume in volumes)).hexdigest()
    known = json.loads(kept.read_text()) if kept.exists() else {}
    found: dict[str, Curve] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for codec in chosen:
            key = hashlib.sha256(f"{digest} {codec}".encode()).hexdigest()
            if key not in known:
                known[key] = []
                for setting in codec.sweep:
                    known[key].append(point := _point(codec, setting, volumes, levels, pool))
                    rate = setting.get("quality", setting.get("quality_layers"))
                    say(
                        f"{codec.name}, {rate}: {point['bits_per_pixel']:.4f} bits a pixel, SSIM {point['ssim']:.4f}, "
                        f"{point['psnr']:.2f} dB, {point['seconds']:.1f} s"
                    )
                write_whole(kept, json.dumps(known))
            found[codec.name] = _curve(known[key], "bits_per_pixel")
            if codec.format == "AVIF":
                found[codec.name + PAYLOAD] = _curve(known[key], "payload")
    return found


def _point(
    codec: Codec,
    setting: dict[str, Any],
    volumes: Sequence[np.ndarray],
    levels: Sequence[np.ndarray],
    pool: ThreadPoolExecutor,
) -> dict[str, float]:
    began = time.perf_counter()
    units = [piece for volume in levels for piece in ([volume] if codec.sequence else volume[:, None])]
    files = list(pool.map(lambda unit: codec.encode(unit, setting), units))
    decoded = iter([image for images in pool.map(decode, files) for image in images])
    values = {name: [] for name in METRICS}
    for volume in volumes:
        images = np.stack([next(decoded) for _ in volume]).astype(np.float32) / 255
        found = metrics.measure(images, volume)
        for name, each in values.items():
            each.extend(found[name].tolist())
    pixels = sum(volume.size for volume in volumes)
    point = {name: float(np.mean(each)) for name, each in values.items()}
    point["bits_per_pixel"] = 8 * sum(map(len, files)) / pixels
    point["payload"] = 8 * sum(map(payload, files)) / pixels if codec.format == "AVIF" else math.nan
    point["seconds"] = time.perf_counter() - began
    return point


def _curve(points: Sequence[dict[str, float]], rate: str) -> Curve:
    """Points by rising rate."""
    order = sorted(points, key=lambda point: point[rate])
    names = {"bits_per_pixel": rate} | {name: name for name in METRICS}
    return {name: np.array([point[key] for point in order]) for name, key in names.items()}


def rising(curve: Curve, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rates and values of a metric, without points that another beats at fewer bits, nor such as are not finite."""
    rates, values = curve["bits_per_pixel"], curve[metric]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(values)[:-1]])
    kept = np.isfinite(values) & (values > before)
    return rates[kept], values[kept]


def rate_for(curve: Curve, metric: str, value: float) -> float:
    """Bits a pixel at which a codec reaches a metric's value, by a cubic in their log2; NaN beyond its curve."""
    rates, values = rising(curve, metric)
    if len(values) < 2 or not values[0] <= value <= values[-1]:
        return math.nan
    return float(2 ** PchipInterpolator(values, np.log2(rates))(value))


def value_at(curve: Curve, metric: str, bits_per_pixel: float) -> float:
    """A metric's value that a codec reaches at so many bits a pixel, by a cubic in their log2; NaN beyond its curve."""
    rates, values = rising(curve, metric)
    if len(values) < 2 or not rates[0] <= bits_per_pixel <= rates[-1]:
        return math.nan
    return float(PchipInterpolator(np.log2(rates), values)(np.log2(bits_per_pixel)))
