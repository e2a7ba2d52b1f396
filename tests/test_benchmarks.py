"""Each benchmark runs, at a tiny size, and prints its table; how fast anything is, is not tested."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL_MODEL = ("--image-size", 32, 16, "--hidden-channels", 8, "--rounds", 1, "--steps", 1)


def run_benchmark(name, *arguments):
    """Lines of the table that a benchmark prints, without its two of header."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *map(str, arguments)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert "nan" not in "".join(rows)
    return rows


@pytest.mark.slow
def test_train_step():
    pytest.importorskip("torch")
    rows = run_benchmark("train_step.py", *SMALL_MODEL, "--batch-size", 2, "--matrix", 64)
    assert [row.split()[1] for row in rows] == ["jax", "torch"]


def test_inference():
    pytest.importorskip("torch")
    rows = run_benchmark("inference.py", *SMALL_MODEL, "--batch-sizes", 1, 2)
    assert [row.split()[1] for row in rows] == ["encode"] * 2 + ["decode"] * 2 + ["reconstruct"] * 2


def test_input_pipeline():
    rows = run_benchmark("input_pipeline.py", "--files", 40, "--image-size", 32, 16, "--rounds", 1)
    assert len(rows) == 5


def test_attention():
    rows = run_benchmark("attention.py", "--rounds", 1, "--steps", 1, "--batch-size", 1, "--image-sizes", "64x32")
    assert [row.split()[3] for row in rows] == ["blocks", "plain"]


@pytest.mark.slow
def test_startup():
    rows = run_benchmark("startup.py", "--preset", "demo", "--rounds", 1, "--batch-size", 1)
    assert len(rows) == 5


@pytest.mark.slow
def test_scaling():
    rows = run_benchmark("scaling.py", "--rounds", 1, "--batch-size", 4, "--vary", "devices", "--steps", 0)
    assert len(rows) == 3
