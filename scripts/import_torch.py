"""Import a model of the published PyTorch code: python scripts/import_torch.py --checkpoint FILE --workdir RUN."""

import dataclasses
from pathlib import Path

import _command
import tyro

from vqvae_jax.inference import torch_import


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Writes a run (config.json and a checkpoint) from a state dict of the published PyTorch model."""

    checkpoint: Path
    """The file that torch.save(model.state_dict(), ...) wrote."""
    workdir: Path
    """Folder of the run to write."""


def main() -> int:
    """Parses the flags, imports, prints."""
    flags = tyro.cli(Flags)
    _command.use_platform("cpu")
    model = torch_import.import_run(flags.checkpoint, flags.workdir).model
    print(
        f"Imported {flags.checkpoint}: {model.hidden_channels} hidden channels, {model.num_embeddings} codes of width "
        f"{model.embedding_dim}\nWritten: {flags.workdir}\nNext: python scripts/eval.py --workdir {flags.workdir} "
        "[--data PATH]"
    )
    return 0


if __name__ == "__main__":
    _command.run(main)
