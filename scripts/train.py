"""Train a VQ-VAE: python scripts/train.py --platform gpu [--preset P] [--data PATH] [--workdir runs/NAME]."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Annotated

import _command
import tyro

from vqvae_jax import config
from vqvae_jax.errors import ConfigError, VQVAEError
from vqvae_jax.runtime import config_file, distributed, runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Trains a VQ-VAE on MRI slices, then evaluates it on the test split."""

    platform: _command.Platform = "auto"
    """What to compute on."""
    workdir: Path | None = None
    """The run's folder; runs/PRESET-TIMESTAMP by default."""
    resume: bool = False
    """Go on with the run in --workdir (by default the newest run), with the settings in its config.json."""
    distributed: bool = False
    """Train together with other processes that are given the same flags, on this host and others."""
    coordinator: str | None = None
    """With --distributed: HOST:PORT of process 0, where PORT is free; found by itself on Slurm and the like."""
    num_processes: int | None = None
    """With --distributed: how many processes there are; found by itself on Slurm and the like."""
    process_id: int | None = None
    """With --distributed: which of them this is, from 0; found by itself on Slurm and the like."""
    config: Annotated[config.Config, tyro.conf.arg(name="")]


def _parse() -> tuple[Flags, Path | None]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--workdir", type=Path)
    early.add_argument("--resume", action="store_true")
    early.add_argument("--from", dest="from_run", type=Path)
    known, _ = early.parse_known_args()
    if known.resume:
        run_dir = known.workdir or runs.newest()
        base = runs.load_config(run_dir)
    elif known.from_run:
        if known.preset:
            raise ConfigError(f"--preset {known.preset}: --from has the settings of {known.from_run}; give one of them")
        base, run_dir = runs.load_config(known.from_run), known.workdir
    else:
        preset = known.preset or "hipmri"
        if preset not in config.PRESETS:
            raise ConfigError(f"--preset {preset}: no such preset; there are {', '.join(config.PRESETS)}")
        base = config.PRESETS[preset]
        run_dir = known.workdir
    flags = tyro.cli(
        Flags,
        default=Flags(config=base),
        description=f"{Flags.__doc__} Presets: {', '.join(config.PRESETS)}.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if flags.config.training.from_run:  # as it is saved
        place = os.path.abspath(flags.config.training.from_run)
        training = dataclasses.replace(flags.config.training, from_run=place)
        flags = dataclasses.replace(flags, config=dataclasses.replace(flags.config, training=training))
    if known.resume:
        config_file.check_resumable(base, flags.config)
    return flags, run_dir


def main() -> int:
    """Parses the flags and trains."""
    flags, run_dir = _parse()
    from vqvae_jax import trainer  # noqa: PLC0415 - after the flags: it takes a second, and --help none
    from vqvae_jax.evaluation import table  # noqa: PLC0415
    from vqvae_jax.inference import beside_avif  # noqa: PLC0415

    if flags.distributed:
        distributed.start(flags.coordinator, flags.num_processes, flags.process_id)
    elif (flags.coordinator, flags.num_processes, flags.process_id) != (None, None, None):
        raise ConfigError("--coordinator, --num-processes and --process-id need --distributed")
    _command.use_platform(flags.platform)
    say = print if distributed.is_first() else _say_nothing
    if distributed.is_first():
        run_dir = run_dir or runs.new(flags.config.preset)
    run_dir = Path(distributed.shared(str(run_dir)))
    if distributed.shared(config_file.to_json(flags.config)) != config_file.to_json(flags.config):
        raise ConfigError("--distributed: the settings are not those of process 0; give all processes the same flags")
    say(f"Run: {run_dir}")
    outcome = trainer.train_and_evaluate(flags.config, run_dir, resume=flags.resume, log=say)
    if outcome.evaluation is None:
        again = f"python scripts/train.py --resume --workdir {run_dir}"
        say(f"Stopped at step {outcome.step}, and saved. Go on with: {again}")
        return 0
    say("Test split, best checkpoint:")
    for line in table.describe(outcome.evaluation, flags.config):
        say(f"  {line}")
    try:
        say(f"  {beside_avif.compare(run_dir)}")  # on all processes: they restore together
    except (VQVAEError, OSError) as error:
        say(f"  Not compared with AVIF: {error}")
    say(
        f"Pictures: {run_dir / 'eval/test/reconstructions.png'} and {run_dir / 'samples'}\n"
        f"Curves: tensorboard --logdir {run_dir} (or {run_dir / 'metrics.jsonl'})\n"
        f"Checkpoints: {run_dir / 'checkpoints'}\n"
        f"Next: python scripts/report.py --workdir {run_dir}"
    )
    return 0


def _say_nothing(line: str) -> None:
    del line


if __name__ == "__main__":
    _command.run(main)
