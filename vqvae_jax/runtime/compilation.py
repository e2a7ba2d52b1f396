"""How XLA compiles our programs: a cache on disk, and what makes them faster on a CPU."""

import functools
import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import jax

from vqvae_jax.runtime.files import cache_folder

FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
GRADIENT = {FUSIONS: "", "xla_disable_hlo_passes": "cse_barrier_expander"}
"""For a program with gradients on a CPU: none of jaxlib 0.10's YNN fusions, and barriers that hold.

YNN's kernel gradients of convolutions are slower, and with it the whole training step takes 1.4 times the memory.
Without barriers, XLA finds that what remat computes again was computed before, and keeps it.
"""
FORWARD = {FUSIONS: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
"""For a program without gradients on a CPU: YNN fusions for products and sums, not for convolutions."""
QUICKLY = {"xla_backend_optimization_level": 0}
"""Options for a program that runs once, where compiling it is most of the time."""
WORTH_CACHING_SECONDS = 0.05


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


def jit(function: Callable, donate_argnums: tuple[int, ...] = (), cpu_options: dict[str, str] = FORWARD) -> Callable:
    """``jax.jit``, with ``cpu_options`` where this process computes on its CPU and its jaxlib knows them.

    Every program with convolutions is compiled here, a pmapped one too: ``jax.pmap`` itself takes no options.
    """
    options = cpu_options if jax.default_backend() == "cpu" and _known(tuple(cpu_options.items())) else None
    return jax.jit(function, donate_argnums=donate_argnums, compiler_options=options)


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
