"""Encode, decode and reconstruct with the published model, JAX against PyTorch eager: images/s at several batch sizes.

    python benchmarks/inference.py [--batch-sizes 1 8 64] [--device gpu --dtype bfloat16]

Encode goes from images to codes, decode from codes to images, reconstruct through both. Both frameworks run in
turn, each in a process of its own; PyTorch under inference_mode, in float32.
"""

import os

import _measure
import numpy as np

from vqvae_jax.config import ModelConfig

TASKS = ("encode", "decode", "reconstruct")


def inputs(config: ModelConfig, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [size, H, W, 1] in [0, 1] and codes int32 [size, h, w], of one level."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.num_codes, (size, *config.latent_size), np.int32)
    return rng.random((size, *config.image_size, 1), np.float32), codes


def repeats(flags, size: int) -> int:
    """Calls in one measurement: the flag's for the largest batch, more for smaller ones."""
    return min(flags.steps * max(1, max(flags.batch_sizes) // size), 16 * flags.steps)


def run_jax(flags) -> None:
    """Measures the Flax model under jit."""
    import jax  # noqa: PLC0415 - each worker imports one framework
    import jax.numpy as jnp  # noqa: PLC0415

    from vqvae_jax import compilation  # noqa: PLC0415
    from vqvae_jax.models.vqvae import VQVAE  # noqa: PLC0415

    config = _measure.model_config(flags)
    model = VQVAE(config)

    def encode(variables, images):
        return model.apply(variables, images, method="to_codes")

    def decode(variables, codes):
        return model.apply(variables, (codes,), method="from_codes")

    def reconstruct(variables, images):
        return model.apply(variables, images).reconstruction

    compiled = (compilation.with_cpu_options(jax.jit(task)) for task in (encode, decode, reconstruct))
    functions = dict(zip(TASKS, compiled, strict=True))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *config.image_size, 1)))
    speeds = {}
    for size in flags.batch_sizes:
        images, codes = map(jnp.asarray, inputs(config, size))
        for task, function in functions.items():
            argument = codes if task == "decode" else images
            seconds = _measure.seconds_each(
                lambda call=function, x=argument: call(variables, x), jax.block_until_ready, repeats(flags, size)
            )
            speeds[f"{task} {size}"] = size / seconds
    _measure.report(**speeds)


def run_torch(flags) -> None:
    """Measures the PyTorch reference, eager."""
    import _torch  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if flags.device == "gpu" else "cpu"
    config = _measure.model_config(flags)
    model = _torch.build(config).eval().to(device)
    functions = {
        "encode": lambda images: model.quantizer.indices(model.encoder(images)),
        "decode": lambda codes: model.decoder(model.quantizer.lookup(codes)),
        "reconstruct": lambda images: model.decoder(
            model.quantizer.lookup(model.quantizer.indices(model.encoder(images)))
        ),
    }
    speeds = {}
    with torch.inference_mode():
        for size in flags.batch_sizes:
            images, codes = (torch.from_numpy(array).to(device) for array in inputs(config, size))
            images = images.permute(0, 3, 1, 2).contiguous()
            for task, function in functions.items():
                argument = codes if task == "decode" else images
                seconds = _measure.seconds_each(
                    lambda call=function, x=argument: call(x), lambda _: _torch.wait(device), repeats(flags, size)
                )
                speeds[f"{task} {size}"] = size / seconds
    _measure.report(**speeds)


def main() -> None:
    """Parses the flags; measures both and prints the table, or is one worker."""
    flags = _measure.parser(__doc__)
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
