"""A run's folder: claimed before any work, its configuration read back, the newest found."""

import os

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


def test_a_new_folder_is_claimed_and_left_empty(tmp_path):
    for resume in (False, True):
        runs.claim(tmp_path / "deep/run", resume)
        assert os.listdir(tmp_path / "deep/run") == []


def test_a_folder_with_a_run_is_claimed_only_to_go_on(tmp_path):
    runs.save_config(tmp_path, Config())
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        runs.claim(tmp_path, resume=False)
    runs.claim(tmp_path, resume=True)


def test_a_folder_with_checkpoints_is_claimed_only_to_go_on(tmp_path):
    (tmp_path / runs.CHECKPOINTS).mkdir()
    runs.claim(tmp_path, resume=False)
    (tmp_path / runs.CHECKPOINTS / "3").mkdir()
    with pytest.raises(ConfigError, match="holds another run's checkpoints"):
        runs.claim(tmp_path, resume=False)
    runs.claim(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    for attempt in (lambda path: runs.claim(path, resume=False), lambda path: runs.save_config(path, Config())):
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
