"""A file is written whole or not at all; the cache lies where the user's caches lie."""

import os
from pathlib import Path

import pytest

from vqvae_jax.runtime import files


def test_writes_replaces_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"old", b"new"):
        files.write_whole(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


def test_text_is_written_as_utf8_with_its_own_line_ends(tmp_path):
    text = "σ = 0.97\nünder\r\nlast\r"
    files.write_whole(tmp_path / "file", text)
    assert (tmp_path / "file").read_bytes() == text.encode("utf-8")


@pytest.mark.parametrize("content", [b"new", "new"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_what_was_there_and_nothing_beside_it(failure, content, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    real = os.replace

    def fail(partial, target):
        assert os.stat(partial).st_size == 3
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(failure)):
        files.write_whole(path, content)
    monkeypatch.setattr(os, "replace", real)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("content", [b"new", "new"])
def test_a_disk_that_fills_while_writing_leaves_what_was_there(failure, content, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    real = Path.write_bytes

    def fail(partial, data):
        real(partial, data[:1])
        raise failure

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(type(failure)):
        files.write_whole(path, content)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_text_that_is_not_unicode_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(path, "caf\ud800")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_cache_lies_in_xdg_cache_home_or_below_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert files.cache_folder() == tmp_path / "caches/vqvae_jax"
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        unset()
        assert files.cache_folder() == tmp_path / "home/.cache/vqvae_jax"
