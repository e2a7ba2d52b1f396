"""How XLA compiles our programs: a cache on disk, and what makes them faster on a CPU."""

import contextlib
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vqvae_jax.runtime.files import cache_folder

CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_disable_hlo_passes": "cse_barrier_expander"}
"""For every program on a CPU: none of jaxlib 0.10's YNN fusions, and barriers that hold.

YNN's convolutions and products are slower, and a training step with them takes 1.4 times the memory. Without barriers,
XLA finds that what remat computes again was computed before, and keeps it. ``jax-plain`` in benchmarks/ has neither.
"""
QUICKLY = {"xla_backend_optimization_level": 0}
"""Options for a program that runs once, where compiling it is most of the time."""
WORTH_CACHING_SECONDS = 0.05
FREE_SHARE = 0.75
"""Of a computer's RAM, what its other programs and Python leave to ours."""


def use_cache() -> None:
    """Keeps compiled programs on disk, so that the next process with the same ones need not compile them.

    They lie in $JAX_COMPILATION_CACHE_DIR where that is set, else in the cache folder under ``compiled``, apart for
    each kind of CPU. A folder that cannot be written is done without.
    """
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = cache_folder() / "compiled" / _kind_of_cpu()
        except RuntimeError:  # a user without a home
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_CACHING_SECONDS)


def jit(function: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
    """``jax.jit``, with CPU_OPTIONS where this process computes on its CPU and its jaxlib knows them.

    Every program with convolutions is compiled here, a pmapped one too: ``jax.pmap`` itself takes no options.
    """
    return jax.jit(function, donate_argnums=donate_argnums, compiler_options=cpu_options())


def ahead(jitted: Any, arguments: tuple) -> jax.stages.Compiled:
    """The program of a function of ``jit`` for these arguments, with the same options: ``lower`` forgets them."""
    return jitted.lower(*arguments).compile(compiler_options=cpu_options())


def bytes_needed(program: jax.stages.Compiled) -> int:
    """Bytes that a program takes on one device: arguments, results and all between."""
    found = program.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def bytes_there() -> int:
    """Bytes that programs may take on one device: what JAX has taken of a GPU, or this device's share of the RAM."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", sys.maxsize)
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # outside a container
        most = min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return int(FREE_SHARE * most) // jax.local_device_count()


def cpu_options() -> dict[str, str] | None:
    """CPU_OPTIONS where this process computes on its CPU and its jaxlib knows them, else None."""
    known = jax.default_backend() == "cpu" and _known(tuple(CPU_OPTIONS.items()))
    return CPU_OPTIONS if known else None


@functools.cache
def _known(options: tuple[tuple[str, str], ...]) -> bool:
    """Whether XLA takes these compiler options; an unknown one in $XLA_FLAGS would end the process."""
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except Exception as error:
        if "option" in str(error).lower() or "field" in str(error).lower():
            return False
        raise
    return True


def _kind_of_cpu() -> str:
    """Programs for one CPU may not run on another that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
