"""Sizes of the golden file, and where it lies; make_golden.py writes it."""

from pathlib import Path

GOLDEN = Path(__file__).with_name("golden.npz")
SIZE = (32, 16)
STEPS = 5
WIDTHS = {
    "hidden": 16,
    "dim": 12,
    "codes": 32,
    "vgg": {
        "conv1_1": 0,
        "conv1_2": 2,
        "conv2_1": 5,
        "conv2_2": 7,
        "conv3_1": 10,
        "conv3_2": 12,
        "conv3_3": 14,
    },
}
