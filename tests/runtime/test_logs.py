"""The scalars' log: one object a line, nothing twice after a resume, nothing that is not JSON."""

import json
import os

import pytest

from vqvae_jax.runtime.logs import MetricsLog


@pytest.fixture
def run(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step, step // 10, "train", {"loss": 1 / step, "psnr": float("inf")})
    log.close()
    return tmp_path


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_step_epoch_split_and_scalars(run):
    assert lines(run)[1] == {"step": 20, "epoch": 2, "split": "train", "loss": 0.05, "psnr": None}
    assert list(run.glob("events.out.tfevents.*"))


def test_resuming_drops_what_was_logged_after_the_checkpoint(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "half a li')
    log = MetricsLog(run, resume_step=20)
    log.write(30, 3, "train", {"loss": 0.5})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(run)] == [(10, 0.1), (20, 0.05), (30, 0.5)]


def test_resuming_rewrites_the_log_whole_or_not_at_all(run, monkeypatch):
    before = (run / "metrics.jsonl").read_bytes()

    def fail(partial, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        MetricsLog(run, resume_step=20)
    assert (run / "metrics.jsonl").read_bytes() == before
