"""A procedural hip phantom, written as NIfTI in the HipMRI layout."""

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from vqvae_jax.data.pelvis import FIELD_OF_VIEW, HALF_DEPTH, render_slice
from vqvae_jax.data.splits import SPLIT_FOLDERS
from vqvae_jax.errors import DataError, require

FORMAT_VERSION = 1  # raise it whenever the same spec no longer gives the same files
RECORD_NAME = "phantom.json"


@dataclass(frozen=True, kw_only=True)
class PhantomSpec:
    """What `write_phantom` writes. `noise` is the Rician sigma as a share of the brightest tissue.

    Raises:
      ConfigError: a field has a value that cannot work; the message names it.
    """

    train_cases: int = 40
    validation_cases: int = 6
    test_cases: int = 8
    slices_per_case: int = 12
    size: tuple[int, int] = (256, 128)
    noise: float = 0.008
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        for name in ("train_cases", "validation_cases", "test_cases", "slices_per_case"):
            count = getattr(self, name)
            require(_whole(count, 1), f"PhantomSpec.{name}", count, "a whole number of at least 1")
        fits = len(self.size) == 2 and all(_whole(n, 8) for n in self.size)
        require(fits, "PhantomSpec.size", self.size, "two whole numbers of at least 8")
        require(0 <= self.noise < 1, "PhantomSpec.noise", self.noise, "in [0, 1)")
        require(_whole(self.seed, 0), "PhantomSpec.seed", self.seed, "a whole number of at least 0")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def write_phantom(folder: Path, spec: PhantomSpec, progress: bool = False) -> Path:
    """Write `spec` under `folder` as keras_slices_*/case_CCC_week_0_slice_S.nii.gz and return the folder.

    Files are 2-D int16 NIfTI-1; no case is in two splits. The folder appears complete or not at all, and one
    that already holds the same phantom is left as it is.

    Raises:
      DataError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder).resolve()
    record = {"format_version": FORMAT_VERSION, **asdict(spec), "size": list(spec.size)}
    if _holds(folder, record):
        return folder
    growing = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        for name in SPLIT_FOLDERS.values():
            (growing / name).mkdir(parents=True)
        jobs = list(_jobs(spec))
        for split, case, index, position in tqdm(jobs, desc="phantom", unit="slice", disable=not progress):
            pixels = render_slice(case, position, size=spec.size, noise=spec.noise, seed=spec.seed)
            path = growing / SPLIT_FOLDERS[split] / f"case_{case:03d}_week_0_slice_{index}.nii.gz"
            nib.save(nib.Nifti1Image(np.rint(pixels).astype(np.int16), _affine(spec)), path)
        (growing / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
        growing.rename(folder)
    except OSError as error:
        if _holds(folder, record):  # another process finished the same phantom first
            return folder
        raise DataError(f"Cannot write the phantom to {folder}: {error}. Name a folder that can be.") from error
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return folder


def _holds(folder: Path, record: dict[str, object]) -> bool:
    """Whether the folder has this very phantom; False if absent or empty, DataError if another."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / RECORD_NAME).read_text())
    except (OSError, ValueError):
        found = None
    if found == record:
        return True
    what = "another phantom" if isinstance(found, dict) else "something that is not a phantom"
    raise DataError(f"{folder} holds {what}: name another folder, or remove this one to have it written anew.")


def _jobs(spec: PhantomSpec) -> Iterator[tuple[str, int, int, float]]:
    """(split, case, slice index, position); cases are numbered through the splits, so none is in two."""
    counts = (spec.train_cases, spec.validation_cases, spec.test_cases)
    splits = [split for split, count in zip(SPLIT_FOLDERS, counts, strict=True) for _ in range(count)]
    positions = np.linspace(-1, 1, spec.slices_per_case + 2)[1:-1]
    for case, split in enumerate(splits):
        for index, position in enumerate(positions):
            yield split, case, index, float(position)


def _affine(spec: PhantomSpec) -> np.ndarray:
    pixel = np.divide(FIELD_OF_VIEW, spec.size)
    return np.diag([*pixel, 2 * HALF_DEPTH / (spec.slices_per_case + 1), 1.0])
