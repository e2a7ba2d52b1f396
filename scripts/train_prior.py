"""Train a prior over a run's codes: python scripts/train_prior.py --platform gpu [--workdir runs/NAME]."""

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

import _command
import tyro

from vqvae_jax import config
from vqvae_jax.errors import ConfigError
from vqvae_jax.runtime import config_file, distributed, runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Trains a prior over the codes of a trained model, in the run's folder prior. It makes .vqz files smaller."""

    platform: _command.Platform = "auto"
    """What to compute on."""
    workdir: Path | None = None
    """The run's folder; the newest in runs/ by default."""
    resume: bool = False
    """Go on with the prior in the run's folder, with the settings in its config.json."""
    distributed: bool = False
    """Train together with other processes that are given the same flags, on this host and others."""
    coordinator: str | None = None
    """With --distributed: HOST:PORT of process 0, where PORT is free; found by itself on Slurm and the like."""
    num_processes: int | None = None
    """With --distributed: how many processes there are; found by itself on Slurm and the like."""
    process_id: int | None = None
    """With --distributed: which of them this is, from 0; found by itself on Slurm and the like."""
    config: Annotated[config.PriorConfig, tyro.conf.arg(name="")]


def _parse() -> tuple[Flags, Path]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--workdir", type=Path)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--help", "-h", action="store_true")
    known, _ = early.parse_known_args()
    if known.help:
        run_dir, base = Path(), config.PriorConfig()
    else:
        run_dir = known.workdir or runs.newest()
        preset = runs.load_config(run_dir).preset
        base = config.PRIOR_PRESETS.get(preset, config.PriorConfig())
        base = runs.load_prior_config(run_dir) if known.resume else base
    flags = tyro.cli(Flags, default=Flags(config=base), config=(tyro.conf.OmitArgPrefixes,))
    if known.resume and flags.config != base:
        raise ConfigError("--resume goes on with the settings in the prior's config.json; leave the other flags out")
    return flags, run_dir


def main() -> int:
    """Parses the flags and trains."""
    flags, run_dir = _parse()
    from vqvae_jax import prior_trainer  # noqa: PLC0415 - after the flags: it takes a second, and --help none

    if flags.distributed:
        distributed.start(flags.coordinator, flags.num_processes, flags.process_id)
    elif (flags.coordinator, flags.num_processes, flags.process_id) != (None, None, None):
        raise ConfigError("--coordinator, --num-processes and --process-id need --distributed")
    _command.use_platform(flags.platform)
    if distributed.shared(config_file.to_json(flags.config)) != config_file.to_json(flags.config):
        raise ConfigError("--distributed: the settings are not those of process 0; give all processes the same flags")
    say = print if distributed.is_first() else _say_nothing
    say(f"Run: {run_dir}")
    outcome = prior_trainer.train_prior(flags.config, run_dir, resume=flags.resume, log=say)
    if outcome.stopped:
        again = f"python scripts/train_prior.py --resume --workdir {run_dir}"
        say(f"Stopped at step {outcome.step}, and saved. Go on with: {again}")
        return 0
    say(
        f"Best on the validation split: {outcome.bits:.3f} bits a code of {outcome.raw_bits:g}\n"
        f"{prior_trainer.DRAWN} new slices: {run_dir / runs.PRIOR / prior_trainer.PICTURE}\n"
        f"Curves: tensorboard --logdir {run_dir / runs.PRIOR}\n"
        f"Next: python scripts/encode.py IN OUT.vqz --workdir {run_dir}"
    )
    return 0


def _say_nothing(line: str) -> None:
    del line


if __name__ == "__main__":
    _command.run(main)
