"""What every command does with an interruption."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PROGRAM = """
import time
import _command

class Held:
    def __del__(self):
        raise KeyboardInterrupt  # as Ctrl-C does at garbage collection, where Python drops it

def main():
    Held()
    time.sleep(30)
    return 0

_command.run(main)
"""


def test_an_interruption_at_garbage_collection_is_not_lost():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=SCRIPTS, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 130
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr
