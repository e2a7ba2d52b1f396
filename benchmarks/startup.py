"""From starting Python to the end of the first training step, with an empty and a warm compilation cache.

    python benchmarks/startup.py [--preset hipmri] [--batch-size 8] [--device gpu]

Each round starts two processes one after the other on one cache folder, which is empty for the first.
The VGG16 weights are random, so that nothing is fetched; data are not read.
"""

import dataclasses
import importlib
import itertools
import os
import tempfile
import time

import _measure

from vqvae_jax.config import PRESETS

PARTS = {
    "imports": "import vqvae_jax.trainer",
    "state": "initial state",
    "step": "first step",
    "second": "second step",
    "start": "all before the first step's end, less a step's own time",
}


def measure(flags) -> None:
    """One start: imports, initial state, first step. Seconds each."""
    times = [time.perf_counter()]

    def lap() -> None:
        times.append(time.perf_counter())

    importlib.import_module("vqvae_jax.trainer")
    lap()
    import _jax  # noqa: PLC0415 - after what is measured
    import jax  # noqa: PLC0415

    from vqvae_jax.runtime import compilation  # noqa: PLC0415

    compilation.use_cache()
    config = PRESETS[flags.preset]
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=flags.batch_size))
    step = _jax.TrainingStep(config)
    jax.block_until_ready(step.state)
    lap()
    for _ in range(2):
        jax.block_until_ready(step())
        lap()
    seconds = [after - before for before, after in itertools.pairwise(times)]
    _measure.report(**dict(zip(PARTS, [*seconds, sum(seconds[:3]) - seconds[3]], strict=True)))


def main() -> None:
    """Parses the flags; measures and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    flags.add_argument("--preset", choices=PRESETS, default="hipmri")
    flags.add_argument("--batch-size", type=int, default=8)
    _measure.add_device_flag(flags)
    flags = flags.parse_args()
    if flags.worker:
        return measure(flags)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would come before ours
    starts: dict[str, list] = {"empty": [], "warm": []}
    for _ in range(flags.rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment = {"XDG_CACHE_HOME": cache, **_measure.platform_of(flags.device)}
            for records in starts.values():
                records.extend(_measure.alternate(__file__, ["start"], 1, **environment)["start"])
    rows = []
    for key, name in PARTS.items():
        empty, warm = (_measure.median(records, key) for records in starts.values())
        rows.append((name, empty, warm, empty / warm))
    _measure.print_table((f"{flags.preset}, batch {flags.batch_size}", "empty cache, s", "warm, s", "ratio"), rows)
    return None


if __name__ == "__main__":
    main()
