"""Write a file whole or not at all; and where files that can be made again are kept."""

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes beside ``path`` and renames, so that a full disk or Ctrl-C leaves what was there.

    Makes the file's folder. Text is written as UTF-8, its line ends as they are; bytes of a file's name that Python
    could not decode are written as those bytes.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the file's name, which may be as long as names may be.
    partial = path.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/vqvae_jax, by default ~/.cache/vqvae_jax.

    Raises:
      RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vqvae_jax"
