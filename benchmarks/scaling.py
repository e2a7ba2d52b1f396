"""How a training step grows with image size, width, codebook and devices: FLOPs, memory, seconds, bytes communicated.

    python benchmarks/scaling.py [--vary image-size hidden-channels num-embeddings devices]

One row for each value, all else as in the first row, each in a process of its own. FLOPs are XLA's count
(_jax.py); memory is what XLA plans for the step on one device, states and weights included; communicated is the
size of what the compiled step hands to its collectives on each device. Several devices are the CPU's, made
by XLA, with the same global batch: they share its cores, so that their seconds show overhead and no gain.
"""

import os
import re

import _measure
import numpy as np

from vqvae_jax.config import Config, ModelConfig, TrainingConfig

VALUES = {
    "image-size": ("128 64", "512 256", "512 512"),
    "hidden-channels": ("64", "128", "512"),
    "num-embeddings": ("256", "4096", "16384"),
    "devices": ("2", "4"),
}
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "f64": 8, "pred": 1}
_COLLECTIVE = re.compile(r"= (.+?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def configure(setting: str, batch_size: int) -> Config:
    """The reference recipe and, for "image-size=128 64", say, that field of its model changed."""
    name, _, value = setting.partition("=")
    values = tuple(map(int, value.split()))
    changes = {}
    if name in ("image-size", "hidden-channels", "num-embeddings"):
        changes[name.replace("-", "_")] = values if len(values) > 1 else values[0]
    return Config(model=ModelConfig(**changes), training=TrainingConfig(batch_size=batch_size))


def communicated(program: str) -> int:
    """Bytes that the collectives of a compiled program (HLO text) return on one device."""
    total = 0
    for shapes, _ in _COLLECTIVE.findall(program):
        for kind, sides in _SHAPE.findall(shapes):
            total += BYTES.get(kind, 0) * int(np.prod([int(side) for side in sides.split(",") if side]))
    return total


def measure(flags) -> None:
    """One setting."""
    import _jax  # noqa: PLC0415 - after the choice of devices
    import jax  # noqa: PLC0415

    step = _jax.TrainingStep(configure(flags.worker, flags.batch_size))
    compiled = step.compile()
    plan = compiled.memory_analysis()
    _measure.report(
        flops=step.flops(),
        memory=(plan.temp_size_in_bytes + plan.argument_size_in_bytes) / _measure.MIB,
        communicated=communicated(compiled.as_text()) / _measure.MIB,
        seconds=_measure.seconds_each(step, jax.block_until_ready, flags.steps, warm_up=1) if flags.steps else None,
    )


def main() -> None:
    """Parses the flags; measures and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    flags.add_argument("--batch-size", type=int, default=4)
    flags.add_argument("--steps", type=int, default=1, help="steps in one measurement; 0 computes only what XLA knows")
    flags.add_argument("--vary", nargs="*", choices=VALUES, default=list(VALUES))
    flags = flags.parse_args()
    if flags.worker:
        return measure(flags)
    settings = ["reference", *(f"{name}={value}" for name in flags.vary for value in VALUES[name])]
    rows = []
    for setting in settings:
        name, _, value = setting.partition("=")
        devices = value if name == "devices" else "1"
        environment = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        }
        records = _measure.alternate(__file__, [setting], flags.rounds, **environment)[setting]
        flops, memory, sent = (_measure.median(records, key) for key in ("flops", "memory", "communicated"))
        per_image = _measure.median(records, "seconds") / flags.batch_size if flags.steps else "not measured"
        images = flags.batch_size / int(devices)
        rows.append((setting, flops / images / 1e9, f"{memory:.0f}", per_image, sent))
    header = ("setting", "GFLOP an image", "planned memory, MiB a device", "seconds an image", "communicated, MiB")
    _measure.print_table(header, rows)
    print(f"\nbatch {flags.batch_size} over all devices; reference is 256 x 128, width 256, K = 1024, 1 device")
    return None


if __name__ == "__main__":
    main()
