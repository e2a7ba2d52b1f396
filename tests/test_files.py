"""A file is written whole or not at all."""

import os

import pytest

from vqvae_jax import files


def test_writes_replaces_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"old", b"new"):
        files.write_whole(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interruption_leaves_what_was_there_and_nothing_beside_it(failure, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    real = os.replace

    def fail(partial, target):
        assert os.stat(partial).st_size == 3
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(failure)):
        files.write_whole(path, b"new")
    monkeypatch.setattr(os, "replace", real)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
