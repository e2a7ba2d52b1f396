"""Encode, decode and reconstruct by a preset's model, JAX against PyTorch: images/s at several batch sizes.

    python benchmarks/inference.py [--preset demo --hidden-channels 64] [--batch-sizes 1 8 64] [--device gpu]

Encode goes from images to codes, decode from codes to images, reconstruct through both. JAX is what users call,
``TrainedModel``, with its scaling by percentiles and its NumPy arrays in and out. PyTorch is the bare network on
tensors that are ready, under inference_mode, in float32: eager and under torch.compile. ``--plain`` has JAX without our
compiler options in the place of both: whether they pay, with this JAX on this CPU. Contenders run in turn, each
in a process of its own.
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
        images, codes = map(prepare, inputs(_measure.preset_config(flags).model, size))
        for task, function in zip(TASKS, functions, strict=True):
            call = functools.partial(function, codes if task == "decode" else images)
            speeds[f"{task} {size}"] = size / _measure.seconds_each(call, wait, repeats)
    _measure.report(**speeds)


def run_jax(flags) -> None:
    """Measures the package's own way from arrays to arrays."""
    import jax  # noqa: PLC0415 - each worker imports one framework

    from vqvae_jax.coding.encoded import EncodedImages  # noqa: PLC0415
    from vqvae_jax.inference.trained_model import TrainedModel  # noqa: PLC0415
    from vqvae_jax.training.state import init_variables  # noqa: PLC0415

    _measure.use_plain_compiler(flags)
    config = _measure.preset_config(flags)
    model = TrainedModel(config, jax.jit(functools.partial(init_variables, config.model))(jax.random.key(0)))

    def decode(codes: np.ndarray) -> np.ndarray:
        shape = (len(codes), *config.model.image_size)
        return model.decode(EncodedImages(codes, shape, np.tile(np.float32([0, 1]), (len(codes), 1))))

    functions = (model.encode, decode, model.reconstruct)
    measure(flags, functions, lambda array: array, lambda _: None)


def run_torch(flags) -> None:
    """Measures the same network in PyTorch, eager or compiled."""
    import _torch  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if flags.device == "gpu" else "cpu"
    model = _torch.Recipe(_measure.preset_config(flags).model).eval().to(device)

    def prepare(array: np.ndarray) -> torch.Tensor:
        """Moves the channels of images, and nothing of codes."""
        return torch.from_numpy(array if array.ndim == 3 else array.transpose(0, 3, 1, 2).copy()).to(device)

    functions = model.encode, model.decode, lambda images: model(images)[0]
    if flags.worker == "torch-compiled":
        functions = tuple(map(torch.compile, functions))
    with torch.inference_mode():
        measure(flags, functions, prepare, lambda _: _torch.wait(device))


def main() -> None:
    """Parses the flags; measures both and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    _measure.add_model_flags(flags)
    flags.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 8, 64))
    flags.add_argument("--steps", type=int, default=2, help="calls in one measurement of the largest batch")
    flags.add_argument("--plain", action="store_true", help="against JAX without our compiler options")
    flags = flags.parse_args()
    names = ("jax", _measure.PLAIN) if flags.plain else ("jax", "torch", "torch-compiled")
    if flags.worker:
        return run_torch(flags) if flags.worker.startswith("torch") else run_jax(flags)
    print(_measure.described(_measure.preset_config(flags), losses=False), flush=True)
    results = _measure.alternate(__file__, names, flags.rounds, **_measure.platform_of(flags.device))
    rows = []
    for task in TASKS:
        for size in flags.batch_sizes:
            ours, *theirs = (_measure.median(results[name], f"{task} {size}") for name in names)
            rows.append((task, size, ours, *theirs, *(ours / their for their in theirs)))
    header = (f"{names[0]} {flags.dtype}, images/s", *names[1:], *(f"times {name}" for name in names[1:]))
    _measure.print_table(("task", "batch", *header), rows)
    return None


if __name__ == "__main__":
    main()
