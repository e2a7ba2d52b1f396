"""The input pipeline: how fast the data set is built, and how many slices/s the loader gives.

    python benchmarks/input_pipeline.py [--files 2048]

A synthetic set in the HipMRI layout (int16 .nii.gz slices) is written to a temporary folder and built; then
TrainLoader is read for whole epochs, with the slices kept in memory, and with none kept, so that they stream.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from unittest import mock

import _measure
import nibabel
import numpy as np

from vqvae_jax.config import DataConfig
from vqvae_jax.data import hip_mri, loader

HIPMRI_FILES = 11_460
HELD_OUT = 4
"""Slices each of validation and test, which are not measured."""
WAYS = {"in memory": loader._kept_bytes, "streaming": lambda: 0}
"""By name, the most bytes of slices that are kept."""


def write_files(root: Path, count: int, size: tuple[int, int]) -> None:
    """``count`` slices: a bright ellipse in noise, which gzip halves as it does scans."""
    rng = np.random.default_rng(0)
    rows, columns = (np.linspace(-1, 1, side)[:, None] for side in size)
    body = 200 * np.exp(-3 * (rows**2 + columns.T**2))
    for split, number in (("train", count - 2 * HELD_OUT), ("validate", HELD_OUT), ("test", HELD_OUT)):
        folder = root / f"keras_slices_{split}"
        folder.mkdir(parents=True)
        for index in range(number):
            pixels = (body * rng.uniform(0.5, 2) + np.abs(rng.normal(0, 10, size))).astype(np.int16)
            name = f"case_{split}{index // 30:03}_week_0_slice_{index % 30}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), folder / name)


def epoch_seconds(batches: loader.TrainLoader) -> float:
    """Seconds that one epoch takes a reader that does nothing else."""
    begin = time.perf_counter()
    for _ in range(batches.steps_per_epoch):
        next(batches)
    return time.perf_counter() - begin


def measure(flags) -> None:
    """One round: build, then a first and two warm epochs each way."""
    size = tuple(flags.image_size)
    config = DataConfig(data=flags.data)
    values = {}
    with tempfile.TemporaryDirectory() as built:
        config = dataclasses.replace(config, tfds_dir=built)
        begin = time.perf_counter()
        builder = hip_mri.build(hip_mri.look(config, size), config, log=lambda line: None)
        values["files/s"] = flags.files / (time.perf_counter() - begin)
        for way, most in WAYS.items():
            with mock.patch.object(loader, "_kept_bytes", most):
                slices = loader.Slices(builder.as_data_source(split="train"), config, size)
            batches = loader.TrainLoader(slices, flags.batch_size, seed=0)
            read = batches.steps_per_epoch * flags.batch_size
            values[f"{way}, first epoch"] = read / epoch_seconds(batches)
            values[f"{way}, warm"] = 2 * read / (epoch_seconds(batches) + epoch_seconds(batches))
    _measure.report(**values)


def main() -> None:
    """Parses the flags; writes the files, measures and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    flags.add_argument("--files", type=int, default=2048, help="slices of the synthetic set")
    flags.add_argument("--image-size", type=int, nargs=2, default=(256, 128))
    flags.add_argument("--batch-size", type=int, default=32)
    flags.add_argument("--data", help="the set, for the workers; the script makes it")
    flags = flags.parse_args()
    if flags.worker:
        return measure(flags)
    with tempfile.TemporaryDirectory() as folder:
        write_files(root := Path(folder) / "set", flags.files, tuple(flags.image_size))
        results = _measure.alternate(
            __file__, ["loader"], flags.rounds, "--data", str(root), **_measure.platform_of("cpu")
        )["loader"]
    rate = _measure.median(results, "files/s")
    rows = [(f"build, files/s ({HIPMRI_FILES} would take {HIPMRI_FILES / rate:.0f} s)", f"{rate:.0f}")]
    for name in list(results[0])[1:]:
        rows.append((f"loader, {name}, slices/s", f"{_measure.median(results, name):.0f}"))
    _measure.print_table(("what", f"median of {flags.rounds}"), rows)
    return None


if __name__ == "__main__":
    main()
