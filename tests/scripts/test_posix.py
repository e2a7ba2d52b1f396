"""Where there is no fcntl, package and commands say in one line which systems are supported."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("[!_]*.py"))
WITHOUT = "import sys; sys.modules['fcntl'] = None; "


def run(code):
    command = [sys.executable, "-c", WITHOUT + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_package_names_the_systems():
    done = run("import vqvae_jax")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: vqvae_jax runs on Linux and macOS, and on Windows ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_command_names_the_systems_in_one_line(name):
    script = str(ROOT / "scripts" / name)
    done = run(
        f"import os, runpy; sys.argv = [{script!r}, '--help']; sys.path.insert(0, os.path.dirname({script!r})); "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: vqvae_jax runs on Linux and macOS")
