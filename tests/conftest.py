"""What several test files share: real data where it is at hand, a tiny run, running a script."""

import fcntl
import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
TINY = [
    *("--platform", "cpu", "--preset", "demo", "--image-size", "32", "16", "--hidden-channels", "8"),
    *("--embedding-dim", "4", "--num-embeddings", "32", "--phantom-cases", "6", "--phantom-slices", "4"),
    *("--batch-size", "8", "--schedule", "steps", "--warmup-steps", "0", "--code-dim", "0", "--residual", "post"),
]
# A shell's background jobs ignore SIGINT, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Compiles each program of the tests once, in all processes of the run and in the scripts they start."""
    folder = of_all_workers(tmp_path_factory) / "compiled"
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def run_script(name, *arguments, cwd, **environment):
    """Runs scripts/NAME as a user would, in ``cwd``; returns status, stdout, stderr."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def compile_fast():
    """For files of tests that mostly compile: quicker compilation, to slower programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def of_all_workers(tmp_path_factory):
    """A folder that the processes of one run of the tests share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Folder in which a tiny model was trained on a tiny phantom, into runs/tiny; and what that printed.

    It is trained once, and each process of the tests has a copy. Tests of several files share that in any order: they
    add no run to it, which would be the newest one.
    """
    shared = of_all_workers(tmp_path_factory) / "tiny-shared"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "printed").exists():
            done = run_script("train.py", *TINY, "--epochs", 3, "--workdir", "runs/tiny", cwd=shared)
            assert done.returncode == 0, done.stderr
            (shared / "printed").write_text(done.stdout)
    place = tmp_path_factory.mktemp("tiny")
    shutil.copytree(shared, place, dirs_exist_ok=True)
    return place, (shared / "printed").read_text()


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a file of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module
