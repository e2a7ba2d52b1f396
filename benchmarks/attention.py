"""Self-attention by blocks of queries against all scores at once: seconds and memory of forward and gradient.

    python benchmarks/attention.py [--batch-size 8] [--image-sizes 256x128 512x512] [--device gpu]

The widths are the reference model's. Memory is what XLA plans for temporary values. What would take more than this
machine has is not run.
"""

import os

import _measure

from vqvae_jax.config import ModelConfig

WAYS = ("blocks", "plain")


def measure(flags) -> None:
    """Both ways at one image size."""
    import _jax  # noqa: PLC0415 - after the choice of platform
    import jax  # noqa: PLC0415

    from vqvae_jax.models import layers  # noqa: PLC0415
    from vqvae_jax.runtime import compilation  # noqa: PLC0415

    height, width = map(int, flags.size.split("x"))
    model = ModelConfig()
    length, channels = height * width // model.downsampling**2, model.hidden_channels
    keys = jax.random.split(jax.random.key(0), 3)
    widths = (channels // 8, channels // 8, channels)
    inputs = [jax.random.normal(k, (flags.batch_size, length, w)) for k, w in zip(keys, widths, strict=True)]
    device = jax.devices()[0]
    limit = device.memory_stats()["bytes_limit"] if flags.device == "gpu" else _memory()
    attend = {"blocks": layers.attend, "plain": _jax.plain_attention}[flags.worker]

    def forward_and_gradient(*given):
        output, pull = jax.vjp(attend, *given)
        return pull(output)

    function = compilation.jit(forward_and_gradient)
    memory = function.lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    seconds = None
    if memory < limit:
        seconds = _measure.seconds_each(lambda: function(*inputs), jax.block_until_ready, flags.steps, warm_up=1)
    _measure.report(memory=memory / _measure.MIB, seconds=seconds)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main() -> None:
    """Parses the flags; measures and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    flags.add_argument("--image-sizes", nargs="+", default=("256x128", "512x256", "512x512"))
    flags.add_argument("--size", help="the size, for the workers")
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--steps", type=int, default=2)
    _measure.add_device_flag(flags)
    flags = flags.parse_args()
    if flags.worker:
        return measure(flags)
    rows = []
    for size in flags.image_sizes:
        where = _measure.platform_of(flags.device)
        results = _measure.alternate(__file__, WAYS, flags.rounds, "--size", size, **where)
        for way in WAYS:
            run = all(record["seconds"] is not None for record in results[way])
            seconds = _measure.median(results[way], "seconds") if run else "not run: not enough memory"
            rows.append((size, way, f"{_measure.median(results[way], 'memory'):.0f}", seconds))
    _measure.print_table(("image", "attention", "temporary memory, MiB", "seconds"), rows)
    return None


if __name__ == "__main__":
    main()
