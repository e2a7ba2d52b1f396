"""Several processes that train together: starting them, and what they must agree on.

In a process by itself everything here does at once what its name says, and waits for nobody.
"""

import collections
import contextlib
import itertools
import pickle
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from vqvae_jax.errors import ConfigError, PeerError
from vqvae_jax.runtime import peers

START_TIMEOUT = 120
"""Seconds in which all processes must have started."""
HEARTBEAT_TIMEOUT = 30
"""Seconds without a sign of life after which a process counts as dead."""
_BUILD_TIMEOUT = 24 * 3600
"""Seconds that others wait while the first process prepares data; should it die, they hear of it much sooner."""
_VOTES_IN_FLIGHT = 2
"""Steps after which a vote is read, so that reading it never makes the device wait."""
_GATHERED = 4096
"""Bytes: what is gathered is padded to a multiple, so that few sizes are compiled for."""
_LINGERING = 2
"""Seconds that the first process outlives an error, so that others with the same error can say so themselves."""

_numbers = itertools.count()


def start(coordinator: str | None, processes: int | None, process: int | None, timeout: int = START_TIMEOUT) -> None:
    """Joins this process to the others; before anything is computed.

    Args:
      coordinator: HOST:PORT of process 0; PORT is free there.
      processes, process: how many there are, and which of them this is, from 0.
      timeout: seconds in which all must have come.
      What is None JAX finds out by itself under Slurm, Open MPI, Kubernetes and on TPUs.

    Raises:
      ConfigError: these do not fit together, JAX cannot find what is missing, or not all processes came in time.
    """
    _check(coordinator, processes, process)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the trainer
    peers.watch()
    flags = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": process}
    missing = [flag for flag, value in flags.items() if value is None]
    late = (
        f"--distributed: not all processes found each other within {timeout} s; see that --coordinator "
        f"{coordinator or '(found by JAX)'} is an address of process 0 that all can reach, that --num-processes is "
        "the same for all, and that each id is used once"
    )
    try:
        with peers.abort_means(late):
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
    except Exception as error:  # JAX raises many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if missing and not isinstance(error, jax.errors.JaxRuntimeError):
            raise ConfigError(
                f"--distributed: JAX cannot find {', '.join(missing)} by itself here ({reason}); give "
                "--coordinator HOST:PORT --num-processes N --process-id I, or start it with Slurm or Open MPI"
            ) from error
        raise ConfigError(f"{late} ({reason})") from error


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise ConfigError(f"--coordinator {coordinator}: must be HOST:PORT of process 0, such as 10.0.0.1:1234")
    if processes is not None and processes < 1:
        raise ConfigError(f"--num-processes {processes}: must be 1 or more")
    if process is not None and not 0 <= process < (processes or process + 1):
        among = f", below --num-processes {processes}" if processes else ""
        raise ConfigError(f"--process-id {process}: must be 0 or more{among}")
    if coordinator is not None and process == 0:
        port = int(coordinator.rpartition(":")[2])
        if port > 65535:
            raise ConfigError(f"--coordinator {coordinator}: port {port} cannot be used; ports end at 65535")
        try:
            socket.create_server(("", port), reuse_port=False).close()
        except OSError as error:  # where JAX would end with a segmentation fault
            raise ConfigError(f"--coordinator {coordinator}: port {port} cannot be used here ({error})") from error


def several() -> bool:
    """Whether this process has others beside it."""
    return _state().num_processes > 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return _state().process_id == 0


def hides_progress() -> bool | None:
    """tqdm's ``disable``: bars are the first process's, on a terminal."""
    return None if is_first() else True


def shared(text: str) -> str:
    """The first process's text, in all of them."""
    if not several():
        return text
    key = f"vqvae/text/{next(_numbers)}"
    if is_first():
        _state().client.key_value_set(key, text)
    return _state().client.blocking_key_value_get(key, START_TIMEOUT * 1000)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Runs its body in the first process, and then in the others, which find what that one made."""
    if not is_first():
        _meet()
    yield
    if is_first():
        _meet()


def gathered(own: dict[Any, Any]) -> dict[Any, Any]:
    """The union of all processes' dictionaries, in all of them."""
    if not several():
        return own
    data = np.frombuffer(pickle.dumps(own), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(-(-int(max(sizes)) // _GATHERED) * _GATHERED, np.uint8)
    padded[: len(data)] = data
    union = {}
    for size, part in zip(sizes, multihost_utils.process_allgather(padded), strict=True):
        union |= pickle.loads(part[:size].tobytes())
    return union


class Stop:
    """Whether to stop: what one process was told, all do, after the same step.

    Args:
      received: not empty once this process was told to stop.

    All processes must ask equally often.
    """

    def __init__(self, received: list[int]):
        self._received = received
        self._votes: collections.deque = collections.deque()
        self._agreed = False
        self._count = jax.pmap(lambda told: jax.lax.psum(told, "all"), axis_name="all", out_axes=None)

    def __bool__(self) -> bool:
        """Whether any process was told to stop by now."""
        return self._ask(waiting=0)

    def soon(self) -> bool:
        """The same as of a few steps ago, without making the device wait."""
        return self._ask(waiting=_VOTES_IN_FLIGHT)

    def _ask(self, waiting: int) -> bool:
        if not several():
            return bool(self._received)
        if not self._agreed:
            self._votes.append(self._count(np.full(jax.local_device_count(), len(self._received), np.int32)))
            while len(self._votes) > waiting:
                self._agreed |= bool(self._votes.popleft())
        return self._agreed


def end(status: int) -> NoReturn:
    """Ends a command: at once where it failed, since the others will not come to a common end."""
    if status and several():
        peers.leave("", status, after=_LINGERING if is_first() else 0)
    sys.exit(status)


@contextlib.contextmanager
def explains_losses() -> Iterator[None]:
    """Raises PeerError instead of what the loss of another process raises."""
    try:
        yield
    except Exception as error:
        if several() and peers.is_loss(error):
            raise PeerError(peers.LOST) from error
        raise


def _meet() -> None:
    """Waits until all processes are here, without a collective: those would time out on some devices."""
    if several():
        _state().client.wait_at_barrier(f"vqvae/meet/{next(_numbers)}", _BUILD_TIMEOUT * 1000)


def _state() -> Any:
    """What JAX knows of the processes. It has no public way to ask without claiming devices, nor to its barriers."""
    return jax_distributed.global_state
