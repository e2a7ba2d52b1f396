"""The prior of a run, loaded for use: as integers."""

from pathlib import Path

import jax

from vqvae_jax.config import Config
from vqvae_jax.models.prior_integers import PriorProgram, to_integers
from vqvae_jax.runtime import runs
from vqvae_jax.training.checkpoint import Checkpoints
from vqvae_jax.training.prior_step import METRIC, make_prior


def doubt(run_dir: Path, fingerprint: str) -> str:
    """Why the prior in a run's folder is not that of the model with this fingerprint; empty if it is, or none is there.

    Raises:
      CheckpointError, ConfigError: there is a prior, and its configuration cannot be read.
    """
    folder = run_dir / runs.PRIOR
    if not (folder / runs.CONFIG).exists() or runs.load_prior_config(run_dir).model == fingerprint:
        return ""
    return f"the prior in {folder} is of another checkpoint of the model, and is not used; train one for this anew"


def load(run_dir: Path, run: Config, fingerprint: str) -> PriorProgram | None:
    """The best prior of a run's codes; None where none was trained, or only for another model's codes.

    Args:
      run_dir: the run's folder.
      run: its configuration.
      fingerprint: of the model whose codes are meant.

    Raises:
      CheckpointError, ConfigError: there is a prior, and it cannot be read.
    """
    if not (run_dir / runs.PRIOR / runs.CONFIG).exists():
        return None
    config = runs.load_prior_config(run_dir)
    if config.model != fingerprint or not (run_dir / runs.PRIOR / runs.CHECKPOINTS).is_dir():
        return None
    prior = make_prior(config, run.model)
    checkpoints = Checkpoints(run_dir / runs.PRIOR, METRIC, read_only=True)
    try:
        if checkpoints.empty():
            return None
        variables = checkpoints.restore_variables(prior.shapes(), "best")
    finally:
        checkpoints.close()
    return PriorProgram(to_integers(prior, jax.device_get(variables)))
