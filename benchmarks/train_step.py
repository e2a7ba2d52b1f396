"""A preset's full training step, JAX against PyTorch: images/s, peak memory, FLOP/s.

    python benchmarks/train_step.py [--preset demo --hidden-channels 64 --no-vgg] [--device gpu --dtype bfloat16]

Forward, all losses with random VGG16 weights, backward, clipping, Adam, on one synthetic batch; the k-means of an EMA
codebook's first batch is over by then. Contenders run in turn, each in a process of its own. ``torch`` is PyTorch
eager in float32, with its defaults; ``torch-compiled`` the same under torch.compile; ``torch-best`` (on a GPU) adds
bfloat16 autocast, channels_last, TF32 and fused Adam to that. ``jax-plain``, if asked for by ``--against``, is JAX
without our compiler options: whether they pay, with this JAX on this CPU. FLOPs are XLA's count (_jax.py), taken for
every contender; their share is of the fastest product of two square matrices in the contender's type that any
contender of that type reached.
"""

import os
import tempfile
from pathlib import Path

import _measure
import numpy as np

MATRIX = {"cpu": 4096, "gpu": 16384}
AGAINST = ("torch", "torch-compiled", "torch-best")
OURS = ("jax", _measure.PLAIN)


def run_jax(flags) -> None:
    """Measures the training step of this package."""
    import _jax  # noqa: PLC0415 - each worker imports one framework, so that its memory is that one's
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    _measure.use_plain_compiler(flags)
    step = _jax.TrainingStep(_measure.preset_config(flags, flags.batch_size))
    flops = step.flops()
    seconds = _measure.seconds_each(step, jax.block_until_ready, flags.steps)
    memory = _measure.peak_rss_mib()
    if flags.device == "gpu":
        memory = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / _measure.MIB
    square = jnp.ones((flags.matrix, flags.matrix), flags.dtype)
    product = _measure.seconds_each(lambda: square @ square, jax.block_until_ready, 5)
    _measure.report(seconds=seconds, memory=memory, product=product, flops=flops, dtype=flags.dtype)


def run_torch(flags) -> None:
    """Measures the same recipe in PyTorch: eager, compiled, or at its best."""
    import _torch  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device, best = "cuda" if flags.device == "gpu" else "cpu", flags.worker == "torch-best"
    config = _measure.preset_config(flags, flags.batch_size)
    model = _torch.Recipe(config.model).to(device)
    features = _torch.Features(np.load(flags.vgg)).to(device) if config.loss.perceptual_weight else None
    images = torch.rand((flags.batch_size, 1, *config.model.image_size), device=device)
    loss = _torch.recipe_loss
    if best:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        model, features = (module and module.to(memory_format=torch.channels_last) for module in (model, features))
        images = images.to(memory_format=torch.channels_last)
    if flags.worker != "torch":
        loss = torch.compile(loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=best)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=best):
            total = loss(model, features, images, config.loss)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clip)
        optimizer.step()

    seconds = _measure.seconds_each(step, lambda _: _torch.wait(device), flags.steps)
    memory = torch.cuda.max_memory_allocated() / _measure.MIB if device == "cuda" else _measure.peak_rss_mib()
    dtype = "bfloat16" if best else "float32"
    square = torch.ones((flags.matrix, flags.matrix), dtype=getattr(torch, dtype), device=device)
    product = _measure.seconds_each(lambda: square @ square, lambda _: _torch.wait(device), 5)
    _measure.report(seconds=seconds, memory=memory, product=product, dtype=dtype)


def save_vgg(path: Path, layer: str) -> None:
    """Writes random VGG16 weights for the PyTorch workers, which do not import JAX."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import _jax  # noqa: PLC0415 - after the choice of platform

    np.savez(path, **_jax.vgg_arrays("random", layer))


def _fastest_products(flags, results: dict[str, list[dict]]) -> dict[str, float]:
    """Type -> FLOP/s of the fastest product in it."""
    records = [record for group in results.values() for record in group]
    return {
        dtype: max(2 * flags.matrix**3 / record["product"] for record in records if record["dtype"] == dtype)
        for dtype in sorted({record["dtype"] for record in records})
    }


def print_results(flags, results: dict[str, list[dict]]) -> None:
    """The table, and what its numbers were taken from."""
    flops = _measure.median(results["jax"], "flops")
    fastest = _fastest_products(flags, results)
    rows = []
    for name, records in results.items():
        seconds, dtype = _measure.median(records, "seconds"), records[0]["dtype"]
        memory, share = f"{_measure.median(records, 'memory'):.0f}", f"{flops / seconds / fastest[dtype]:.0%}"
        ratio, speed = seconds / _measure.median(results["jax"], "seconds"), f"{flops / seconds / 1e9:.0f}"
        rows.append((name, dtype, flags.batch_size / seconds, ratio, memory, speed, share))
    header = ("contender", "type", "images/s", "JAX is faster by", "peak memory, MiB", "GFLOP/s", "of a product's")
    _measure.print_table(header, rows)
    products = ", ".join(f"{dtype} {speed / 1e9:.0f}" for dtype, speed in fastest.items())
    print(f"\n{flops / 1e9:.0f} GFLOP a step; products of {flags.matrix}-square matrices, GFLOP/s: {products}")


def main() -> None:
    """Parses the flags; measures everyone and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    _measure.add_model_flags(flags)
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--steps", type=int, default=3, help="steps in one measurement, after two to warm up")
    flags.add_argument(
        "--against", nargs="*", choices=(*AGAINST, _measure.PLAIN), help="none: JAX alone; by default all that fit"
    )
    flags.add_argument("--matrix", type=int, help="side of the matrices whose product is the yardstick")
    flags.add_argument("--vgg", help="VGG16 weights for the workers; the script makes them")
    flags = flags.parse_args()
    flags.matrix = flags.matrix or MATRIX[flags.device]
    if flags.worker:
        return run_jax(flags) if flags.worker in OURS else run_torch(flags)
    against = AGAINST[: 2 + (flags.device == "gpu")] if flags.against is None else flags.against
    config = _measure.preset_config(flags, flags.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        save_vgg(path := Path(folder) / "vgg.npz", config.loss.perceptual_layers[-1])
        where = _measure.platform_of(flags.device)
        print(_measure.described(config), flush=True)
        names = ("jax", *against)
        return print_results(flags, _measure.alternate(__file__, names, flags.rounds, "--vgg", str(path), **where))


if __name__ == "__main__":
    main()
