"""What is kept of images and of NIfTI files once they are encoded."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImages:
    """All that is kept of N images.

    Attributes:
      indices: int32 [N, h, w], the codes.
      shape: of the array that was encoded: [H, W], [H, W, 1], [N, H, W] or [N, H, W, 1].
      ranges: float32 [N, 2], the intensities of each image that became 0 and 1.
    """

    indices: np.ndarray
    shape: tuple[int, ...]
    ranges: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedNifti:
    """All that is kept of a NIfTI file.

    Attributes:
      images: its slices, encoded, of shape [N, H, W].
      header: all that precedes the voxels in the file, byte for byte.
      slice_axis: the axis of the voxels along which they were cut into slices; None for a file that is one slice.
      axis_reason, axis_doubt: why that axis, and what may be wrong with it, for people.
    """

    images: EncodedImages
    header: bytes
    slice_axis: int | None
    axis_reason: str = ""
    axis_doubt: str = ""
