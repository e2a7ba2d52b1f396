"""A real run on a tiny phantom: it learns, it can be stopped and resumed to the last bit, it stops when lost."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from vqvae_jax import checkpoint, config, evaluation, trainer, training
from vqvae_jax.errors import ConfigError, DivergenceError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder that the runs of this file share; data sets and phantoms are made below it once."""
    folder = tmp_path_factory.mktemp("trainer")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def tiny(**training_fields):
    demo = config.PRESETS["demo"]
    training_fields = {"schedule": "steps", "warmup_steps": 0} | training_fields
    sizes = {"image_size": (32, 16), "hidden_channels": 8, "embedding_dim": 4, "num_embeddings": 32, "code_dim": 0}
    return dataclasses.replace(
        demo,
        model=dataclasses.replace(demo.model, **sizes, residual="post"),
        data=dataclasses.replace(demo.data, phantom_cases=6, phantom_slices=4),
        training=dataclasses.replace(demo.training, batch_size=8, sample_images=0, **training_fields),
    )


def final_state(run, settings):
    checkpoints = checkpoint.Checkpoints(run, read_only=True)
    state, progress = checkpoints.restore(training.create_train_state(settings, 3))
    checkpoints.close()
    return state, progress


def lines(run, split):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["split"] == split]


def test_the_loss_falls_and_ssim_rises(place):
    run = place / "learns"
    settings = tiny(epochs=30, learning_rate=3e-3, decay_epochs=30)
    outcome = trainer.train_and_evaluate(settings, run, log=lambda line: None)
    train, validation = lines(run, "train"), lines(run, "validation")
    assert [entry["epoch"] for entry in train] == list(range(1, 31))
    assert train[-1]["l1"] < 0.7 * train[0]["l1"]
    assert validation[-1]["ssim"] > validation[0]["ssim"] + 0.1
    assert outcome.evaluation.summary()["ssim"] > validation[0]["ssim"]


def stop_after(count, monkeypatch):
    """Sends this process SIGTERM while the run takes its step number ``count``."""
    make, taken = training.make_train_step, []

    def make_counting(settings):
        step = make(settings)

        def counting(*arguments):
            taken.append(None)
            if len(taken) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        return counting

    monkeypatch.setattr(training, "make_train_step", make_counting)


@pytest.mark.parametrize("steps", [3, 5], ids=["after an epoch", "within an epoch"])
def test_a_stopped_and_resumed_run_equals_one_in_one_go(place, monkeypatch, steps):
    settings = tiny(epochs=3)
    whole, parts = place / "whole", place / f"parts{steps}"
    if not whole.exists():
        trainer.train_and_evaluate(settings, whole, log=lambda line: None)
    with monkeypatch.context() as patched:
        stop_after(steps, patched)
        stopped = trainer.train_and_evaluate(settings, parts, log=lambda line: None)
    assert stopped.evaluation is None
    assert stopped.step == steps
    resumed = trainer.train_and_evaluate(settings, parts, resume=True, log=lambda line: None)
    assert resumed.evaluation is not None
    (one, one_progress), (other, other_progress) = final_state(whole, settings), final_state(parts, settings)
    assert one_progress == other_progress
    for name in ("step", "params", "model_state", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))
    for split in ("train", "validation"):
        for entry, same in zip(lines(whole, split), lines(parts, split), strict=True):
            timing = ("images_per_second", "input_wait")
            assert all(same[name] == value for name, value in entry.items() if name not in timing)


def test_a_signal_handler_is_put_back(place):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(ConfigError):
        trainer.train_and_evaluate(tiny(epochs=1), place / "whole", log=lambda line: None)
    with trainer._stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(place):
    run = place / "early"
    run.mkdir()
    said = []
    trainer.train_and_evaluate(tiny(epochs=1), run, resume=True, log=said.append)
    assert any("from the beginning" in line for line in said)
    assert lines(run, "train")[0]["step"] == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(place, monkeypatch):
    make, run, settings = training.make_train_step, place / "lost", tiny(epochs=3)

    def make_failing(settings):
        step = make(settings)

        def failing(state, images, vgg_params):
            broken = images * np.where(int(state.step) == 4, np.nan, 1.0).astype(np.float32)
            return step(state, broken, vgg_params)

        return failing

    monkeypatch.setattr(training, "make_train_step", make_failing)
    with pytest.raises(DivergenceError, match=r"not finite at step 5 .*checkpoint is at step 3"):
        trainer.train_and_evaluate(settings, run, log=lambda line: None)
    state, progress = final_state(run, settings)
    assert progress["epoch"] == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_run_is_not_resumed_on_other_data(place):
    settings = tiny(epochs=3)
    more = dataclasses.replace(settings, data=dataclasses.replace(settings.data, phantom_slices=5))
    with pytest.raises(ConfigError, match="--data has 30 training slices, but the run was trained on 24"):
        trainer.train_and_evaluate(more, place / "whole", resume=True, log=lambda line: None)


def test_nothing_is_compiled_after_the_first_epoch(place):
    """Training, validation, pictures and checkpoints of later epochs find every program ready."""
    compiled, after_epoch = [], []

    def note(name, seconds, **_):
        del seconds
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    def log(line):
        if line.startswith("Epoch"):
            after_epoch.append(len(compiled))

    settings = tiny(epochs=4, accumulate=2)
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, sample_images=2))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        trainer.train_and_evaluate(settings, place / "compiled", log=log)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert after_epoch[0] > 0
    assert after_epoch[1:] == [after_epoch[1]] * 3


def test_training_stops_when_validation_no_longer_improves(place, monkeypatch):
    """Validation SSIM is best after the second epoch; two epochs later patience ends."""
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.5])
    summary = evaluation.Evaluation.summary
    monkeypatch.setattr(evaluation.Evaluation, "summary", lambda self: summary(self) | {"ssim": next(scores)})
    said = []
    outcome = trainer.train_and_evaluate(tiny(epochs=9, early_stopping=2), place / "stale", log=said.append)
    assert outcome.evaluation is not None
    assert [entry["epoch"] for entry in lines(place / "stale", "validation")] == [1, 2, 3, 4]
    assert any("Stopped early" in line and "0.3000" in line for line in said)


def test_a_warm_up_without_end_is_refused(place):
    with pytest.raises(ConfigError, match=r"--warmup-steps 6 is not below the 6 steps .*2 epochs of 3"):
        trainer.train_and_evaluate(tiny(epochs=2, warmup_steps=6), place / "cold", log=lambda line: None)


def test_averaged_weights_are_evaluated_and_training_resumes_from_the_latest(place, monkeypatch):
    """Stopped and resumed as in one go; the checkpoint's model is the average, which differs from the weights."""
    settings = tiny(epochs=3, average_decay=0.9)
    trainer.train_and_evaluate(settings, place / "averaged", log=lambda line: None)
    stop_after(4, monkeypatch)
    trainer.train_and_evaluate(settings, place / "averaged-resumed", log=lambda line: None)
    monkeypatch.undo()
    trainer.train_and_evaluate(settings, place / "averaged-resumed", resume=True, log=lambda line: None)
    states = [final_state(place / name, settings)[0] for name in ("averaged", "averaged-resumed")]
    for name in ("params", "model_state", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, *(getattr(state, name) for state in states))
    kernels = [jax.tree.leaves(tree)[0] for tree in (states[0].params, states[0].average["params"])]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def with_adversary(settings, start):
    fields = {"adversarial_weight": 0.5, "adversarial_start": start}
    fields |= {"discriminator_channels": 8, "discriminator_layers": 1}
    return dataclasses.replace(settings, loss=dataclasses.replace(settings.loss, **fields))


def test_an_adversary_is_reported(place):
    """It joins in the second epoch of three steps."""
    settings, said = with_adversary(tiny(epochs=2), start=3), []
    trainer.train_and_evaluate(settings, place / "duel", log=said.append)
    first, second = lines(place / "duel", "train")
    assert first["adversarial_weight"] == 0 < second["adversarial_weight"]
    assert second["discriminator"] != first["discriminator"] > 0
    assert any(line.startswith("Discriminator: 0.00 M parameters, joins after 3 steps") for line in said)
    (line,) = (line for line in said if line.startswith("Epoch [2/2]"))
    labels = {"generator": "Generator", "discriminator": "Discriminator", "adversarial_weight": "Adversarial weight"}
    assert all(f"{label}: {second[name]:.4f}, " in line for name, label in labels.items())


@pytest.mark.slow
def test_an_adversary_goes_on_after_a_resume(place, monkeypatch):
    """Stopped in the second epoch, in which it joined."""
    settings = with_adversary(tiny(epochs=2), start=3)
    trainer.train_and_evaluate(settings, place / "duel-whole", log=lambda line: None)
    stop_after(4, monkeypatch)
    trainer.train_and_evaluate(settings, place / "duel-resumed", log=lambda line: None)
    monkeypatch.undo()
    trainer.train_and_evaluate(settings, place / "duel-resumed", resume=True, log=lambda line: None)
    one, other = (final_state(place / name, settings)[0] for name in ("duel-whole", "duel-resumed"))
    assert one.adversary.step == 3
    for a, b in ((one, other), (one.adversary, other.adversary)):
        jax.tree.map(np.testing.assert_array_equal, (a.params, a.opt_state), (b.params, b.opt_state))
    jax.tree.map(np.testing.assert_array_equal, one.model_state, other.model_state)


def test_an_adversary_that_would_never_join_is_refused(place):
    settings = with_adversary(tiny(epochs=2), start=6)
    with pytest.raises(ConfigError, match=r"--adversarial-start 6 is not below the 6 steps .*2 epochs of 3"):
        trainer.train_and_evaluate(settings, place / "late", log=lambda line: None)
