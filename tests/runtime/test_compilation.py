"""Compiled programs are kept from one process to the next; options are only used where XLA knows them."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from vqvae_jax.runtime import compilation

PROGRAM = """
import jax, jax.monitoring
from vqvae_jax.runtime import compilation
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append("cache_hits" in name))
compilation.use_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(1.0)
print(sum(hits), jax.config.jax_compilation_cache_dir)
"""


def run(**environment):
    """Number of programs found in the cache, and the cache's folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    hits, folder = done.stdout.split()
    return int(hits), Path(folder)


def test_the_next_process_finds_what_one_compiled(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert run(**environment)[0] == 0
    hits, folder = run(**environment)
    assert hits > 0
    assert folder.parent == tmp_path / "vqvae_jax" / "compiled"


def test_a_chosen_folder_is_kept(tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[1] == tmp_path / "mine"


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "vqvae_jax").touch()
    assert run(XDG_CACHE_HOME=str(tmp_path))[0] == 0


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    changed = {}
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_compilation_cache_dir=None, update=changed.setdefault))
    compilation.use_cache()
    assert changed
    changed.clear()
    monkeypatch.setattr(Path, "home", no_home)
    compilation.use_cache()
    assert not changed


def double(x):
    return 2 * x


@pytest.mark.parametrize("options", [{"xla_no_such_option": ""}, compilation.CPU_OPTIONS])
def test_programs_are_compiled_with_the_options_that_this_xla_knows(options, monkeypatch):
    monkeypatch.setattr(compilation, "CPU_OPTIONS", options)
    ones = jnp.ones((jax.local_device_count(), 3))
    for function in (double, jax.pmap(double)):
        assert (compilation.jit(function)(ones) == 2).all()


def test_nothing_in_the_package_is_jitted_with_convolutions_but_here():
    """A bare jax.jit leaves the options out: it may serve only rooms whose programs have no convolutions."""
    bare = {path for path in (ROOT / "vqvae_jax").rglob("*.py") if re.search(r"jax\.(jit|pmap)\b", path.read_text())}
    rooms = {path.relative_to(ROOT / "vqvae_jax").as_posix() for path in bare}
    assert rooms <= {
        "runtime/compilation.py",
        "runtime/distributed.py",  # a sum over devices
        "training/step.py",  # jax.pmap, which it gives to compilation.jit
        *("training/state.py", "training/prior_step.py"),  # initial values, compiled quickly
        *(f"metrics/{name}.py" for name in ("images", "codes", "measure", "similarity")),
    }
