"""Encode, decode and reconstruct with the reference model, JAX against PyTorch eager: images/s at several batch sizes.

    python benchmarks/inference.py [--batch-sizes 1 8 64] [--device gpu --dtype bfloat16]

Encode goes from images to codes, decode from codes to images, reconstruct through both. Both frameworks run in
turn, each in a process of its own; PyTorch under inference_mode, in float32.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import _measure
import numpy as np

from vqvae_jax.config import ModelConfig

TASKS = ("encode", "decode", "reconstruct")


def inputs(config: ModelConfig, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [size, H, W, 1] in [0, 1] and codes int32 [size, h, w]."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.num_embeddings, (size, *config.latent_size), np.int32)
    return rng.random((size, *config.image_size, 1), np.float32), codes


def measure(
    flags, functions: Sequence[Callable[[Any], Any]], prepare: Callable[[np.ndarray], Any], wait: Callable[[Any], Any]
) -> None:
    """Images/s of each task at each batch size: as many calls as the flag says for the largest, more for smaller ones.

    Args:
      flags: the benchmark's.
      functions: one for each of TASKS, of images or of codes.
      prepare: makes what they take of an array of ``inputs``.
      wait: waits for a result.
    """
    speeds = {}
    for size in flags.batch_sizes:
        repeats = min(flags.steps * max(1, max(flags.batch_sizes) // size), 16 * flags.steps)
        images, codes = map(prepare, inputs(_measure.model_config(flags), size))
        for task, function in zip(TASKS, functions, strict=True):
            call = functools.partial(function, codes if task == "decode" else images)
            speeds[f"{task} {size}"] = size / _measure.seconds_each(call, wait, repeats)
    _measure.report(**speeds)


def run_jax(flags) -> None:
    """Measures the Flax model under jit."""
    import jax  # noqa: PLC0415 - each worker imports one framework
    import jax.numpy as jnp  # noqa: PLC0415

    from vqvae_jax.models.vqvae import VQVAE  # noqa: PLC0415
    from vqvae_jax.runtime import compilation  # noqa: PLC0415

    config = _measure.model_config(flags)
    model = VQVAE(config)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *config.image_size, 1)))

    def compiled(task: Callable) -> Callable:
        return functools.partial(compilation.with_cpu_options(jax.jit(task)), variables)

    functions = (
        compiled(functools.partial(model.apply, method="to_indices")),
        compiled(functools.partial(model.apply, method="from_indices")),
        compiled(lambda variables, images: model.apply(variables, images).reconstruction),
    )
    measure(flags, functions, jnp.asarray, jax.block_until_ready)


def run_torch(flags) -> None:
    """Measures the PyTorch reference, eager."""
    import _torch  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if flags.device == "gpu" else "cpu"
    model = _torch.fast_reference(_measure.model_config(flags)).eval().to(device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return model.quantizer.indices(model.encoder(images))

    def decode(codes: torch.Tensor) -> torch.Tensor:
        return model.decoder(model.quantizer.lookup(codes))

    def prepare(array: np.ndarray) -> torch.Tensor:
        """Moves the channels of images, and nothing of codes."""
        return torch.from_numpy(array if array.ndim == 3 else array.transpose(0, 3, 1, 2).copy()).to(device)

    with torch.inference_mode():
        functions = encode, decode, lambda images: decode(encode(images))
        measure(flags, functions, prepare, lambda _: _torch.wait(device))


def main() -> None:
    """Parses the flags; measures both and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    _measure.add_model_flags(flags)
    flags.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 8, 64))
    flags.add_argument("--steps", type=int, default=2, help="calls in one measurement of the largest batch")
    flags = flags.parse_args()
    if flags.worker:
        return {"jax": run_jax, "torch": run_torch}[flags.worker](flags)
    results = _measure.alternate(__file__, ("jax", "torch"), flags.rounds, **_measure.platform_of(flags.device))
    rows = []
    for task in TASKS:
        for size in flags.batch_sizes:
            ours, theirs = (_measure.median(results[name], f"{task} {size}") for name in ("jax", "torch"))
            rows.append((task, size, ours, theirs, ours / theirs))
    _measure.print_table(("task", "batch", f"JAX {flags.dtype}, images/s", "PyTorch, images/s", "ratio"), rows)
    return None


if __name__ == "__main__":
    main()
