"""The package's rooms, each importing only from those before it; and the sizes that keep it readable."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from changed_settings import FIELDS
from conftest import ROOT

ROOMS = (
    *("errors", "config", "runtime", "data", "models", "metrics", "training", "evaluation", "coding", "inference"),
    *("trainer", "prior_trainer"),
)
NUMERIC = ("models", "metrics", "training")
NUMERIC_IMPORTS = {"jax", "flax", "optax", "numpy", "vqvae_jax"} | sys.stdlib_module_names
CHECKPOINT, WEIGHTS = "training/checkpoint.py", "models/vgg_weights.py"
PMAPS = {"training/step.py", "runtime/distributed.py"}
"""The steps, and the votes on whether to stop."""
LONGEST_STEP, MOST_FLAGS, LONGEST_CONFIG = 60, 55, 350

PACKAGE = ROOT / "vqvae_jax"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
SCRIPTS = {"scripts"} | {path.stem for path in (ROOT / "scripts").glob("*.py")}


class Import(NamedTuple):
    """One name that a module imports: ``module``, as ``a.b``, and whether a function does it."""

    module: str
    in_function: bool


def imports(name, source):
    """What the package's module of this name imports, wherever in it."""
    parts = ("vqvae_jax", *Path(name).parts)  # of its package, once the last is left out
    found = []

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, in_function) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = [*parts[: len(parts) - node.level], *filter(None, [node.module])] if node.level else [node.module]
            found.extend(Import(".".join([*base, alias.name]), in_function) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, in_function or inside)

    visit(ast.parse(source), False)
    return found


def uses(source, word):
    """Whether a module names this, as a name, an attribute or an import."""
    named = ("id", "attr", "name")
    return any(getattr(node, kind, None) == word for node in ast.walk(ast.parse(source)) for kind in named)


def room_of(name):
    return Path(name).parts[0].removesuffix(".py")


def complaints(name, source):
    """What is wrong with the imports of a module of the package."""
    own = room_of(name)
    if own not in ROOMS:
        return [f"{name} lies in no room"]
    before = ROOMS[: ROOMS.index(own) + 1]
    found = []
    for module, in_function in imports(name, source):
        root, _, rest = module.partition(".")
        place = rest.partition(".")[0]
        if root == "vqvae_jax" and place not in ROOMS:
            found.append(f"{name} imports {module}, which is in no room")
        elif root == "vqvae_jax" and place not in before:
            found.append(f"{name} imports {module}, from a later room")
        if root in SCRIPTS:
            found.append(f"{name} imports {module}, from the scripts")
        if root == "importlib":
            found.append(f"{name} imports what cannot be read from its source")
        if root == "orbax" and name != CHECKPOINT:
            found.append(f"{name} imports {module}; only {CHECKPOINT} may")
        allowed = root in NUMERIC_IMPORTS or (name == CHECKPOINT and root == "orbax")
        if own in NUMERIC and not allowed and not (name == WEIGHTS and in_function):
            found.append(f"{name} imports {module}, beyond jax, flax, optax and numpy")
    return found


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "__init__.py"])
def test_a_module_imports_from_its_own_room_and_those_before_it(name):
    assert complaints(name, SOURCES[name]) == []


def test_every_room_is_there():
    assert {room_of(name) for name in SOURCES if name != "__init__.py"} == set(ROOMS)


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("losses.py", "", "in no room"),
        ("data/a.py", "from vqvae_jax import VQVAE", "imports vqvae_jax.VQVAE, which is in no room"),
        ("data/a.py", "import vqvae_jax", "in no room"),
        ("data/a.py", "from vqvae_jax import *", "in no room"),
        ("data/a.py", "from vqvae_jax import errors, models", "vqvae_jax.models, from a later room"),
        ("data/a.py", "from vqvae_jax.models.vqvae import VQVAE", "from a later room"),
        ("data/a.py", "import vqvae_jax.models.vqvae as m", "from a later room"),
        ("data/a.py", "from ..models import vqvae", "vqvae_jax.models.vqvae, from a later room"),
        ("data/a.py", "from .. import models", "from a later room"),
        ("data/a.py", "def f():\n    if 1:\n        from vqvae_jax import trainer", "from a later room"),
        ("config.py", "from vqvae_jax.runtime import files", "from a later room"),
        ("config.py", "from .runtime import files", "from a later room"),
        ("trainer.py", "from scripts import _command", "from the scripts"),
        ("trainer.py", "def f():\n    import _command", "from the scripts"),
        ("trainer.py", "import importlib", "cannot be read"),
        ("trainer.py", "import orbax.checkpoint as ocp", "only training/checkpoint.py"),
        ("inference/a.py", "def f():\n    from orbax import checkpoint", "only training/checkpoint.py"),
        ("metrics/a.py", "import scipy.ndimage", "beyond jax"),
        ("metrics/a.py", "def f():\n    import scipy", "beyond jax"),
        ("training/checkpoint.py", "import tensorstore", "beyond jax"),
        ("models/vgg_weights.py", "try:\n    import torch\nexcept ImportError:\n    pass", "beyond jax"),
        ("models/vgg_weights.py", "class A:\n    import torch", "beyond jax"),
    ],
)
def test_an_import_from_the_wrong_place_is_told(name, source, words):
    (found,) = complaints(name, source)
    assert words in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("data/a.py", "from vqvae_jax import config, data\nfrom vqvae_jax.runtime.files import write_whole"),
        ("data/a.py", "import scipy\nfrom . import b\nfrom .b import c\nfrom ..errors import DataError"),
        ("training/checkpoint.py", "import json\nimport orbax.checkpoint\nfrom vqvae_jax import metrics"),
        ("models/vgg_weights.py", "def f():\n    import torch"),
    ],
)
def test_an_import_from_the_right_place_is_not(name, source):
    assert complaints(name, source) == []


def test_the_steps_alone_are_pmapped():
    assert uses("from jax import pmap as p\np(f)", "pmap") and uses("import jax\njax.pmap(f)", "pmap")
    assert {name for name, source in SOURCES.items() if uses(source, "pmap")} == PMAPS
    assert not [path for path in (ROOT / "scripts").glob("*.py") if uses(path.read_text(), "pmap")]


def test_the_training_step_is_one_function_that_fits_a_page():
    named = {node.name: node for node in ast.walk(ast.parse(SOURCES["training/step.py"])) if hasattr(node, "name")}
    outer, inner = named["make_train_step"], named["train_step"]
    assert inner in outer.body
    assert inner.end_lineno - inner.lineno + 1 <= LONGEST_STEP


def test_the_configuration_is_short():
    assert len(SOURCES["config.py"].splitlines()) < LONGEST_CONFIG


def test_the_configuration_needs_no_jax():
    script = "import sys, vqvae_jax.config; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_training_has_few_flags_and_each_setting_is_one():
    command = [sys.executable, ROOT / "scripts/train.py", "--help"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    flags = re.findall(r"│ (--[\w-]+)", done.stdout)  # where a box's line begins: help is further to the right
    assert len(flags) == len(set(flags)) <= MOST_FLAGS
    settings = {f"--{name.replace('_', '-')}" for _, name in FIELDS} - {"--reference-flatten"}  # of imports alone
    settings = settings - {"--from-run"} | {"--from"}
    assert settings < set(flags)
    assert "--reference-flatten" not in done.stdout
