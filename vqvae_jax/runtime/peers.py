"""The loss of another process of a run: one line and exit status 2, instead of a wait without end or pages of log.

It shows in two ways. A collective fails, and Python sees an error (``is_loss`` tells it from others). Or JAX's
coordination service misses a process's heartbeats, or its own process 0: then a thread of JAX's prints a log with
a stack trace to stderr and calls ``abort``. Python cannot be asked first (what JAX has for that, a callback,
cannot be called from it), so ``watch`` reads along on stderr and handles the signal of ``abort``.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

LOST = (
    "another process of this run has ended or cannot be reached (its own output says why); what was saved is kept: "
    "start all of them again, with --resume if training had begun"
)

_ABORTS = b"JAX distributed service detected fatal errors"
"""In the last line that the coordination service logs before it aborts."""
_SERVICE = b"coordination_service"
"""In its other lines: the names of the files that log them."""
_RECORD = re.compile(rb"[IWEF]\d{4} ")
"""How a record of XLA's log begins: its severity and date."""
_SIGNS = ("Gloo", "NCCL", "RCCL", "coordination service", "CoordinationService")
"""In messages of errors that a lost process causes in the others."""
_READING_ALONG = 2.0
"""Seconds until what was logged before an abort has surely been read."""

_explanation = [LOST]
_leaving = threading.Lock()
_kept: list = []
"""What C code refers to, which must not be collected."""


def watch() -> None:
    """From now on an abort of JAX's coordination service is one line on stderr, and exit status 2.

    Python's stderr stays what it was; what C++ code writes there is passed on by a thread, line by line.
    """
    shown = os.dup(2)
    sys.stderr = os.fdopen(shown, "w", buffering=1, errors="backslashreplace", closefd=False)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    aborts = threading.Event()
    threading.Thread(target=_pass_on, args=(reading, shown, aborts), daemon=True).start()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number: int) -> None:
        del number
        if aborts.wait(_READING_ALONG):
            leave(_explanation[-1], 2)
        # Otherwise it is another's abort, which goes on once this returns.

    _kept.append(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)


@contextlib.contextmanager
def abort_means(message: str) -> Iterator[None]:
    """What an abort within the body is said to mean, instead of ``LOST``."""
    _explanation.append(message)
    yield
    _explanation.pop()


def _pass_on(reading: int, shown: int, aborts: threading.Event) -> None:
    """Copies lines, up to those of the coordination service that say at length what is said in one."""
    about_loss = False
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            if _ABORTS in line:
                aborts.set()
            if _RECORD.match(line):  # other lines belong to the record before them
                about_loss = _SERVICE in line
            if not about_loss and not aborts.is_set():
                os.write(shown, line)


def is_loss(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is what the loss of another process looks like."""
    while error is not None:
        if any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(message: str, status: int, after: float = 0) -> NoReturn:
    """Ends this process without a clean end, which would wait for the others.

    Args:
      message: shown on stderr, unless this process was about to leave already.
      status: the exit status.
      after: seconds to wait.
    """
    _leaving.acquire()  # and never released: whoever comes second waits here for the end
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        if message:
            print(f"{sys.argv[0]}: {message}", file=sys.stderr)
        sys.stderr.flush()
    time.sleep(after)
    os._exit(status)
