"""What a file is, by its path: an image, a label map, or something to leave out."""

import re
from pathlib import PurePosixPath

IMAGE, LABEL_MAP, LEFT_OUT = "image", "label map", "left out"
SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_NOT_READ = (
    (re.compile(r"\.(zip|tar|tgz|tar\.gz|7z|rar)$", re.IGNORECASE), "an archive: unpack it"),
    (
        re.compile(r"\.(hdr|img)(\.gz)?$", re.IGNORECASE),
        "half of a .hdr and .img pair: convert the pair to one .nii file",
    ),
    (re.compile(r"\.nii\b(?!(\.gz)?$)", re.IGNORECASE), "an odd name: it must end in .nii or .nii.gz; rename it"),
)
"""Files that are named and not read, and what to do with them."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
LABEL_WORDS = {
    *("label", "labels", "labelmap", "labelmaps", "seg", "segs", "dseg", "segmentation", "segmentations", "segmented"),
    *(
        "mask",
        "masks",
        "masked",
        "gt",
        "groundtruth",
        "annotation",
        "annotations",
        "contour",
        "contours",
        "roi",
        "rois",
    ),
}
"""Words of folders and files that hold label maps: nnU-Net's labelsTr, BIDS's *_mask and *_dseg, HipMRI's
keras_slices_seg_train and semantic_labels_only, seg_train, *_label.nii.gz."""


def words(name: str) -> list[str]:
    """The words of a folder's or a file's name in lower case: labelsTr is labels, tr."""
    return [word.lower() for word in _WORD.findall(name)]


def stem(name: str) -> str:
    """A file's name without .nii or .nii.gz."""
    return SUFFIX.sub("", PurePosixPath(name).name)


def role_of(name: str) -> tuple[str, str] | None:
    """Role and reason of a file by its path below the data set's root; None for what has nothing to do with NIfTI."""
    path = PurePosixPath(name)
    reason = next((why for pattern, why in _NOT_READ if pattern.search(path.name)), "")
    if not reason and not SUFFIX.search(path.name):
        return None
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return LEFT_OUT, "hidden"
    return (LEFT_OUT, reason) if reason else _image_or_label_map(path)


def _image_or_label_map(path: PurePosixPath) -> tuple[str, str]:
    for folder in path.parts[:-1]:
        if LABEL_WORDS.intersection(words(folder)):
            return LABEL_MAP, f"folder {folder}"
    found = LABEL_WORDS.intersection(words(stem(path.name)))
    return (LABEL_MAP, f"{min(found)} in the file's name") if found else (IMAGE, "")
