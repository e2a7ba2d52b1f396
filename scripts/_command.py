"""What every command shares: choosing the platform, and turning errors into one line and an exit status."""

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Literal

try:
    import vqvae_jax  # noqa: F401
except ImportError as error:  # on a system that is not supported
    print(f"{sys.argv[0]}: {error}", file=sys.stderr)
    sys.exit(2)
import jax

from vqvae_jax.errors import ConfigError, VQVAEError
from vqvae_jax.runtime import compilation, distributed

Platform = Literal["auto", "cpu", "gpu", "tpu"]
USER_ERROR, INTERRUPTED = 2, 130


def use_platform(platform: Platform) -> None:
    """Makes JAX use one kind of device ("auto" leaves it the choice), and its cache of compiled programs.

    Raises:
      ConfigError: JAX finds no such device.
    """
    compilation.use_cache()
    if platform != "auto":
        # Not "gpu" by name: JAX knows it as cuda or rocm, and prefers either to the CPU by itself.
        jax.config.update("jax_platforms", None if platform == "gpu" else platform)
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        found, reason = "none", " ".join(str(error).split())[:200]
    else:
        reason = f"JAX finds only {found}"
    if found == "none" or platform not in ("auto", found):
        raise ConfigError(
            f"--platform {platform}: no such device ({reason}); install requirements-cuda.txt and see that nvidia-smi "
            "lists a GPU, or use --platform cpu"
        )


def run(main: Callable[[], int]) -> None:
    """Runs a command and exits: 0 if done, 2 with one line on stderr for what its user can mend."""
    for stream in (sys.stdout, sys.stderr):  # so that no file's name, in no locale, stops a command
        stream.reconfigure(errors="backslashreplace")
    # What fails in Orbax's threads is raised again where it is waited for, and said in one line there.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    threading.excepthook = lambda failure: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # Orbax's, of a full disk
    show = sys.unraisablehook
    sys.unraisablehook = lambda failure: _unraised(failure, show)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half-made is cleaned up
    try:
        status = main()
    except KeyboardInterrupt:
        status = complain("interrupted; run it again (a training with --resume)", INTERRUPTED)
    except Exception as error:
        explained = explain(error)
        if explained is None and not distributed.several():
            raise
        if explained is None:
            traceback.print_exc()
        status = 1 if explained is None else complain(explained, USER_ERROR)
    distributed.end(status)


def _unraised(failure: "sys.UnraisableHookArgs", show: Callable[["sys.UnraisableHookArgs"], None]) -> None:
    """What to do with an exception that Python could not raise where it happened."""
    error = failure.exc_value
    if isinstance(error, KeyboardInterrupt):  # Ctrl-C in a destructor or at garbage collection: it would be lost
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        return
    # Two things after a full disk: a log that was cut short is written once more when Python lets go of it, and fails
    # again; and TensorStore's threads report to an event loop that Orbax has closed.
    if not isinstance(error, OSError) and not (
        isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    ):
        show(failure)


def explain(error: Exception) -> str | None:
    """One line for what its user can mend, a full disk or memory among it; None for anything else."""
    if isinstance(error, VQVAEError):
        return str(error)
    if not isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError):
        return None
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        advice = "; free space and run again (with --resume)" if error.errno == errno.ENOSPC else ""
        return f"{place}{error.strerror or error}{advice}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error):
        return "out of memory; use smaller images (in training: --batch-size, --image-size or --hidden-channels)"
    return None


def complain(message: str, status: int) -> int:
    """Prints one line on stderr; returns the status."""
    sys.stdout.flush()
    print(f"{sys.argv[0]}: {message}", file=sys.stderr)
    return status
