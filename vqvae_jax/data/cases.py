"""Who a file's patient is, by its path. A case is a patient: all of a patient's files belong to one case."""

import re
from pathlib import PurePosixPath

from vqvae_jax.data import roles

_BIDS_SUBJECT = re.compile(r"(?<![^/_])sub-[A-Za-z0-9]+")
_KNOWN = (
    re.compile(r"(?P<case>case_?\d+)_?week", re.IGNORECASE),  # HipMRI: case_004_week_0_slice_1, Case_004_Week0_LFOV
    re.compile(r"(?P<case>case_[^_/]+)_week_", re.IGNORECASE),
    re.compile(r"(?<!\d)(?P<case>\d{3}_S_\d{4})(?!\d)"),  # ADNI
    re.compile(r"(?<![A-Za-z])(?P<case>OAS1_\d{4}|OAS2_\d{4}|OAS[34]\d{4})(?!\d)"),  # OASIS
    re.compile(r"(?<![A-Za-z])(?P<case>IXI\d{3})(?!\d)"),
    re.compile(r"(?P<case>prostatex[-_]?\d{4})(?!\d)", re.IGNORECASE),
)
"""Patients of well-known data sets."""
_NOT_A_PATIENT = (
    re.compile(r"(t[12]w?|t2star|pdw?|adc|dwi|dti|flair|b\d+|mr[ia]?|ct|swi)", re.IGNORECASE),  # modality
    re.compile(r"\d+([._]\d+)?t(esla)?", re.IGNORECASE),  # field strength
    re.compile(r"(v|ver|version|release|r|rev)?[-_]?\d+([._]\d+)+", re.IGNORECASE),  # version
    re.compile(r"(v|ver|version|release|rev)[-_]?\d+", re.IGNORECASE),
    re.compile(r"\d+x\d+(x\d+)?", re.IGNORECASE),  # size
    re.compile(r"\d+([._]\d+)?mm(iso)?", re.IGNORECASE),  # spacing
    re.compile(r"[23]-?d", re.IGNORECASE),
    re.compile(r"(task|dataset)\d+", re.IGNORECASE),  # nnU-Net, Medical Segmentation Decathlon
    re.compile(r"fold[-_]?\d+", re.IGNORECASE),
)
"""Parts of folders' names that have a number and say nothing of a patient."""
_PART = re.compile(r"[^-_ ]+")


def case_of(name: str, pattern: re.Pattern | None = None) -> str:
    """The case that a file belongs to, from its path below the data set's root.

    By default, the first of these that is found: BIDS's ``sub-<label>``; the patient in a name of HipMRI, ADNI,
    OASIS, IXI or PROSTATEx; the first folder whose name has a number that is no modality (T1), field strength
    (1.5T), version, size or spacing; the file name up to and with its first number
    (``prostate_0001_tra.nii.gz`` -> ``prostate_0001``); the file name.

    With ``pattern``: what it matches (its first group if it has one), else as above.
    """
    if pattern and (match := pattern.search(name)):
        return (pattern.groups and match.group(1)) or match.group()
    if match := _BIDS_SUBJECT.search(name):
        return match[0]
    for known in _KNOWN:
        if match := known.search(name):
            return match["case"]
    path = PurePosixPath(name)
    for folder in path.parts[:-1]:
        if names_patient(folder):
            return folder
    stem = roles.stem(name)
    match = re.match(r"\D*\d+", stem)
    return match[0] if match else stem


def names_patient(folder: str) -> bool:
    """Whether a folder's name has a number that can be a patient's."""
    if any(known.fullmatch(folder) for known in _NOT_A_PATIENT):
        return False
    rest = [part for part in _PART.findall(folder) if not any(known.fullmatch(part) for known in _NOT_A_PATIENT)]
    return any(re.search(r"\d", part) for part in rest)
