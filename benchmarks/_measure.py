"""What every benchmark shares: alternating subprocesses, medians, tables, and a description of the machine."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqvae_jax.config import PRESETS, Config
from vqvae_jax.errors import ConfigError, VQVAEError

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
_MARK = "MEASURED "
_PACKAGES = ("jax", "flax", "torch", "grain")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser without flags, whose help begins with the first line of a benchmark's description."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(description=description.partition("\n")[0], formatter_class=formatter)


def timing_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark of speed; ``--worker`` is how it calls itself."""
    flags = parser(description)
    flags.add_argument("--rounds", type=int, default=3, help="measurements of each, taken in turn")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    return flags


def add_device_flag(flags: argparse.ArgumentParser) -> None:
    """The flag of the benchmarks that also run on a GPU."""
    flags.add_argument("--device", choices=("cpu", "gpu"), default="cpu")


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """Flags of the benchmarks that run a preset's network against PyTorch."""
    flags.add_argument("--preset", choices=PRESETS, default="hipmri", help="whose network and losses")
    flags.add_argument("--image-size", type=int, nargs=2, default=(256, 128))
    flags.add_argument("--hidden-channels", type=int, help="by default the preset's")
    flags.add_argument("--no-attention", action="store_true", help="leave self-attention out")
    flags.add_argument("--no-vgg", action="store_true", help="leave the perceptual loss out")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of JAX's convolutions")
    add_device_flag(flags)


PLAIN = "jax-plain"
"""The contender that is JAX without the compiler options of ``runtime.compilation``."""


def use_plain_compiler(flags: argparse.Namespace) -> None:
    """Leaves the compiler options out in a worker that is PLAIN."""
    from vqvae_jax.runtime import compilation  # noqa: PLC0415 - after the choice of platform

    if flags.worker == PLAIN:
        compilation.cpu_options = lambda: None


def preset_config(flags: argparse.Namespace, batch_size: int = 8) -> Config:
    """The preset, with what the flags of ``add_model_flags`` change and random VGG16 weights."""
    config = PRESETS[flags.preset]
    changes = {"image_size": flags.image_size, "precision": flags.dtype}
    if flags.hidden_channels:
        changes["hidden_channels"] = flags.hidden_channels
    if flags.no_attention:
        changes["attention"] = False
    loss = dataclasses.replace(config.loss, vgg_weights="random")
    if flags.no_vgg:
        loss = dataclasses.replace(loss, perceptual_weight=0)
    training = dataclasses.replace(config.training, batch_size=batch_size)
    model = dataclasses.replace(config.model, **changes)
    return dataclasses.replace(config, model=model, loss=loss, training=training)


def described(config: Config, losses: bool = True) -> str:
    """What a benchmark was taken of, in a line; with ``losses``, of training."""
    model = config.model
    parts = [f"{config.preset}, {model.image_size[0]} x {model.image_size[1]}, width {model.hidden_channels}"]
    parts += [] if model.attention else ["no attention"]
    if losses:
        vgg = f"VGG16 to {config.loss.perceptual_layers[-1]}" if config.loss.perceptual_weight else "no VGG16"
        parts += [vgg, f"batch {config.training.batch_size}"]
    return ", ".join(parts)


def alternate(
    script: str, names: Sequence[str], rounds: int, *extra: str, **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """Runs ``script --worker NAME`` with this process's flags, each name in turn and each in a process of its own.

    Args:
      script: the benchmark.
      names: its workers; every other round takes them backwards.
      rounds: how often each runs.
      extra: more flags for them.
      environment: changes to theirs.

    Returns:
      name -> what its workers reported, one dict a round.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            done = subprocess.run(
                [sys.executable, script, *sys.argv[1:], *extra, "--worker", name],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            reported = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
            if done.returncode or not reported:
                sys.exit(f"{Path(script).name} --worker {name} failed with status {done.returncode}")
            results[name].append(json.loads(reported[-1].removeprefix(_MARK)))
    return results


def report(**values: Any) -> None:
    """How a worker hands its measurements back."""
    print(_MARK + json.dumps(values))


def median(records: Sequence[dict[str, Any]], key: str) -> float:
    """Median over rounds of one measurement."""
    return statistics.median(record[key] for record in records)


def seconds_each(call: Callable[[], Any], finish: Callable[[Any], Any], repeats: int, warm_up: int = 2) -> float:
    """Mean seconds of ``call``, after ``warm_up`` calls; ``finish`` waits for a result, once at the end."""
    for _ in range(warm_up):
        finish(call())
    begin = time.perf_counter()
    for _ in range(repeats):
        result = call()
    finish(result)
    return (time.perf_counter() - begin) / repeats


def peak_rss_mib() -> float:
    """Most memory this process has had, MiB (ru_maxrss is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def platform_of(device: str) -> dict[str, str]:
    """Environment under which JAX uses ``device``."""
    return {"JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu"}[device]}


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table, under a line that says when and on what."""
    print(f"{datetime.date.today()}; {machine()}\n\n{table(header, rows)}")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three digits."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def run(main: Callable[[], Any]) -> None:
    """Runs a benchmark that reads data and runs; what its user can mend is said in one line, with exit status 2."""
    try:
        main()
    except VQVAEError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def output_folder(path: Path) -> Path:
    """Makes a folder for results before any long work. Raises ConfigError if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror}); choose another") from error


def machine() -> str:
    """Cores, CPU, GPU if one is listed, and versions."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = ", " + subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = ""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{len(os.sched_getaffinity(0))} cores of {cpu}{gpu}; {', '.join(versions)}"
