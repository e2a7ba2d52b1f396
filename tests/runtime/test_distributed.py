"""Two real processes over loopback train as one does, stop together, and do not outlive each other."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_script

from vqvae_jax.errors import CheckpointError, ConfigError
from vqvae_jax.runtime import distributed, peers

# Codes that are drawn from the batch (EMA) are other ones where it is shared; and at a high rate, Adam makes steps
# of the rounding errors that are the gradients of biases before batch norm. With seed 0, one value lies so near a kink
# (of L1 or the activation) that rounding decides its gradient: losses agree to 1e-6, that gradient's norm to 3e-4.
pytestmark = pytest.mark.slow

SETTINGS = [*TINY, "--codebook-update", "gradient", "--learning-rate", "1e-5", "--sample-images", "0"]
SETTINGS += ["--residual-blocks", "0", "--perceptual-weight", "0"]  # sooner compiled
SETTINGS += ["--seed", "1", "--flip", "--gamma", "0.3"]  # drawn for each image, whoever reads it
LIMITS = {"train": {"rel": 3e-5}, "validation": {"rel": 3e-5, "abs": 1e-5}}
"""Losses agree relative to themselves, metrics to their scale of 1: an untrained model's SSIM may lie near 0."""
TIMINGS = ("images_per_second", "input_wait")
LOST = "another process of this run has ended"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def processes(place, run, *flags, count=2, script="train.py"):
    """The processes of a run, each with one CPU device; killed if they outlive the body."""
    port, started = free_port(), []
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    try:
        for index in range(count):
            joined = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
            joined += ["--process-id", str(index), "--workdir", run, "--platform", "cpu", *map(str, flags)]
            started.append(
                subprocess.Popen(
                    [sys.executable, "-u", ROOT / "scripts" / script, *joined],
                    cwd=place,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def wait_for(words, process):
    """Reads the process's output up to a line with these words."""
    lines = []
    while not lines or words not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate(timeout=60)[1]
    return lines


def finish(started):
    """Output and errors of processes that end well."""
    found = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), found
    return found


def entries(run, split):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if name not in ("split", *TIMINGS)}
        for entry in found
        if entry["split"] == split
    ]


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(place):
    """Folder of a run of three epochs in one process."""
    done = run_script("train.py", *SETTINGS, "--epochs", 3, "--workdir", "alone", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "alone"


@pytest.fixture(scope="module")
def stopped(place, alone):
    """Folder of a run in two processes, the second of which was told to stop; and what each printed."""
    with processes(place, "together", *SETTINGS, "--epochs", 5000) as started:
        lines = wait_for("Epoch [3/", started[0])
        started[1].send_signal(signal.SIGTERM)
        found = finish(started)
    return place / "together", ("".join(lines) + found[0][0], found[1][0]), [errors for _, errors in found]


def test_two_processes_train_as_one_does(alone, stopped):
    run, *_ = stopped
    for split, limit in LIMITS.items():
        for one, two in zip(entries(alone, split), entries(run, split), strict=False):
            assert two == pytest.approx(one, **limit), split


def test_all_stop_when_one_is_told_to_and_the_first_alone_writes_and_prints(stopped):
    run, printed, errors = stopped
    assert "Stopped at step" in printed[0]
    assert "2 x cpu in 2 processes" in printed[0]
    assert [line for line in printed[1].splitlines() if "[Gloo]" not in line] == []
    assert errors[1] == ""
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    epochs = [entry["epoch"] for entry in entries(run, "train")]
    assert epochs == list(range(1, len(epochs) + 1))


def test_two_processes_train_a_prior_as_one_does(place, alone):
    flags = ("--epochs", 2, "--batch-size", 8, "--channels", 8, "--blocks", 1)
    for run in ("one", "two"):
        shutil.copytree(alone, place / run)
    done = run_script("train_prior.py", *flags, "--workdir", "one", "--platform", "cpu", cwd=place)
    assert done.returncode == 0, done.stderr
    with processes(place, "two", *flags, script="train_prior.py") as started:
        finish(started)
    one, two = (
        [entry["bits_per_code"] for entry in entries(place / run / "prior", "validation")] for run in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-4) and len(two) == 2
    assert (place / "two/prior/samples.png").read_bytes().startswith(b"\x89PNG")


def test_one_process_goes_on_with_a_run_of_two(stopped):
    run, printed, _ = stopped
    step = int(printed[0].split("Stopped at step ")[1].split(",")[0])
    epochs = step // 3 + 1
    done = run_script("train.py", "--resume", "--workdir", run, "--platform", "cpu", "--epochs", epochs, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert f"Resuming at step {step}, epoch {epochs}" in done.stdout
    assert entries(run, "train")[-1]["step"] == 3 * epochs


def test_two_processes_go_on_with_a_run_of_one_and_evaluate_it(place, alone):
    """The same epoch as one process would have added, and the same figures on the test split."""
    whole, run = (shutil.copytree(alone, place / name) for name in ("whole", "resumed"))
    with processes(place, run, "--resume", "--epochs", 4) as started:
        finish(started)
    done = run_script("train.py", "--resume", "--workdir", whole, "--platform", "cpu", "--epochs", 4, cwd=place)
    assert done.returncode == 0, done.stderr
    assert [entry["epoch"] for entry in entries(run, "train")] == [1, 2, 3, 4]
    for split in ("train", "validation"):
        assert entries(run, split)[-1] == pytest.approx(entries(whole, split)[-1], **LIMITS[split])
    one, two = (json.loads((folder / "eval/test/metrics.json").read_text()) for folder in (whole, run))
    for told in ("protocol", "data"):
        assert two.pop(told) == one.pop(told)
    assert two == pytest.approx(one, **LIMITS["validation"])
    one, two = ((folder / "eval/test/per_slice.csv").read_text().splitlines() for folder in (whole, run))
    assert [row.split(",")[:5] for row in two] == [row.split(",")[:5] for row in one]


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_does_not_outlive_another(place, alone, killed):
    run = shutil.copytree(alone, place / f"killed{killed}")
    with processes(place, run, "--resume", "--epochs", 5000) as started:
        wait_for("Epoch [4/", started[0])
        started[killed].kill()
        other = started[1 - killed]
        _, errors = other.communicate(timeout=60)
    assert other.returncode == 2
    assert LOST in errors
    assert "--resume" in errors
    assert len(errors.splitlines()) == 1
    assert (run / "checkpoints/9").is_dir()


def test_a_process_that_falls_silent_is_missed(place, alone):
    """A process that is stopped has not closed its connections, like one whose host or network is gone."""
    run = shutil.copytree(alone, place / "silent")
    with processes(place, run, "--resume", "--epochs", 5000) as started:
        wait_for("Epoch [4/", started[0])
        started[1].send_signal(signal.SIGSTOP)
        _, errors = started[0].communicate(timeout=60)
    assert started[0].returncode == 2
    assert LOST in errors
    assert len(errors.splitlines()) == 1


def test_processes_that_do_not_come_are_not_waited_for_without_end(place):
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import _command
from vqvae_jax.runtime import distributed
_command.run(lambda: distributed.start("127.0.0.1:{free_port()}", 2, 1, timeout=5))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "not all processes found each other within 5 s" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("10.0.0.1", 2, 0), "--coordinator 10.0.0.1: must be HOST:PORT"),
        (("10.0.0.1:1234", 0, 0), "--num-processes 0: must be 1 or more"),
        (("10.0.0.1:1234", 2, 2), "--process-id 2: must be 0 or more, below --num-processes 2"),
        (("10.0.0.1:70000", 2, 0), "port 70000 cannot be used"),
    ],
)
def test_flags_that_cannot_work(given, words):
    with pytest.raises(ConfigError, match=words):
        distributed.start(*given)


def test_a_port_in_use():
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(ConfigError, match="Address already in use"),
    ):
        distributed.start(f"127.0.0.1:{server.getsockname()[1]}", 2, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--distributed"], "JAX cannot find --coordinator, --num-processes, --process-id by itself"),
        (["--process-id", "1"], "--coordinator, --num-processes and --process-id need --distributed"),
    ],
)
def test_flags_that_are_missing(place, flags, words):
    done = run_script("train.py", *TINY, *flags, cwd=place)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_loss_of_a_process_is_told_from_other_errors():
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1234")
    try:
        try:
            raise gloo
        except ValueError as error:
            raise CheckpointError("checkpoint could not be written") from error
    except CheckpointError as error:
        assert peers.is_loss(error)
    assert not peers.is_loss(OSError(28, "No space left on device"))
