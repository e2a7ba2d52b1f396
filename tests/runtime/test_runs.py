"""A run's folder: claimed before any work, its configuration read back, the newest found."""

import os
import subprocess
import sys

import pytest

from vqvae_jax.config import PRESETS, Config
from vqvae_jax.errors import CheckpointError, ConfigError
from vqvae_jax.runtime import runs


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_is_read_as_it_was_saved(preset, tmp_path):
    runs.save_config(tmp_path / "run", Config())
    runs.save_config(tmp_path / "run", PRESETS[preset])
    assert runs.load_config(tmp_path / "run") == PRESETS[preset]
    assert os.listdir(tmp_path / "run") == [runs.CONFIG]


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe"])
def test_a_configuration_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / runs.CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError if content is None else ConfigError, match=r"config\.json: ") as caught:
        runs.load_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_runs_started_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20250102-030405")
    names = [runs.new("demo").as_posix() for _ in range(3)]
    assert names == [f"runs/demo-20250102-030405{end}" for end in ("", "-2", "-3")]
    assert all((tmp_path / name).is_dir() for name in names)


def test_a_place_for_runs_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=r"^runs/demo-.* cannot be made .*--workdir"):
        runs.new("demo")


def test_a_new_folder_is_claimed_and_removed_where_it_stays_empty(tmp_path):
    for resume in (False, True):
        with runs.claimed(tmp_path / "deep/run", resume):
            assert os.listdir(tmp_path / "deep/run") == [runs.LOCK]
        assert not (tmp_path / "deep/run").exists()
    with pytest.raises(KeyError), runs.claimed(tmp_path / "deep/run", resume=False):
        raise KeyError
    assert not (tmp_path / "deep/run").exists()


def test_a_folder_that_was_used_stays(tmp_path):
    with runs.claimed(tmp_path / "run", resume=False):
        runs.save_config(tmp_path / "run", Config())
    assert (tmp_path / "run" / runs.CONFIG).exists()


def claim(run_dir, resume):
    with runs.claimed(run_dir, resume):
        pass


def test_a_folder_that_another_process_holds_is_refused_until_it_ends(tmp_path):
    lines = (
        "import sys; from pathlib import Path; from vqvae_jax.runtime import runs",
        "with runs.claimed(Path(sys.argv[1]), False):",
        "    (Path(sys.argv[1]) / 'metrics.jsonl').touch()",
        "    print('held', flush=True)",
        "    sys.stdin.read()",
    )
    command = [sys.executable, "-c", "\n".join(lines), tmp_path / "run"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"another process trains in it \(process {process.pid} on"):
                claim(tmp_path / "run", resume)
        process.kill()
    claim(tmp_path / "run", resume=False)
    assert (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["a[1]", "a[b]c", "a\\b", "a**b", "gs:", "up[1]/run"])
def test_a_name_that_no_checkpoint_is_restored_from_is_refused(name, tmp_path):
    """Tried with Orbax 0.12: it saves there, and finds nothing when it restores."""
    with pytest.raises(ConfigError, match=r"^--workdir .*cannot be restored from a path with .*; choose another"):
        claim(tmp_path / name, resume=False)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["a[b", "a]b", "a]b[", "a*b", "a?b", "a b", "$HOME", "a{b}", "Ωش", "x" * 230, "~a"])
def test_other_odd_names_are_taken(name, tmp_path):
    with runs.claimed(tmp_path / name, resume=False):
        assert (tmp_path / name).is_dir()


def test_a_folder_with_a_run_is_claimed_only_to_go_on(tmp_path):
    runs.save_config(tmp_path, Config())
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        claim(tmp_path, resume=False)
    claim(tmp_path, resume=True)


def test_a_folder_with_checkpoints_is_claimed_only_to_go_on(tmp_path):
    (tmp_path / runs.CHECKPOINTS).mkdir()
    claim(tmp_path, resume=False)
    (tmp_path / runs.CHECKPOINTS / "3").mkdir()
    with pytest.raises(ConfigError, match="holds another run's checkpoints"):
        claim(tmp_path, resume=False)
    claim(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    for attempt in (lambda path: claim(path, resume=False), lambda path: runs.save_config(path, Config())):
        with pytest.raises(ConfigError, match=r"--workdir .*file/run cannot be written .*; choose another"):
            attempt(tmp_path / "file/run")


def test_the_newest_run_is_the_one_that_was_written_to_last(tmp_path):
    for name, age in (("old", 20), ("new", 10)):
        runs.save_config(tmp_path / name, Config())
        os.utime(tmp_path / name / runs.CONFIG, (1000 - age, 1000 - age))
    (tmp_path / "no run").mkdir()
    assert runs.newest(tmp_path).name == "new"
    (tmp_path / "old" / runs.METRICS).write_text("")
    assert runs.newest(tmp_path).name == "old"


def test_without_a_run_the_error_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run in .*; train one with scripts/train\.py, or give"):
        runs.newest(tmp_path)
