"""How tests run a benchmark."""

import os
import subprocess
import sys

from conftest import ROOT


def start_benchmark(name, *arguments, cwd=None):
    """Runs benchmarks/NAME as a user would."""
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *map(str, arguments)],
        cwd=cwd,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_benchmark(name, *arguments, cwd=None):
    """Lines of the table that a benchmark prints, without its two of header."""
    done = start_benchmark(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert "nan" not in "".join(rows)
    return rows
