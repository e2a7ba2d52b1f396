"""Where the time of a preset's training step goes: a table of XLA's ops, their share, and the convolutions' FLOP/s.

    python benchmarks/profile_step.py [--preset demo --hidden-channels 64 --no-vgg] [--top 25]
    python benchmarks/profile_step.py --what encode  # or decode, prior, sampling

``encode`` and ``decode`` are the model's halves. ``prior`` is the training step of the prior over the preset's codes,
``sampling`` draws so many slices' codes from it.

Profiles ``--steps`` steps (jax.profiler.trace) and adds up the trace's events by op. On a CPU this is done on one core,
since convolutions on several are not in the trace. A convolution's FLOP/s are those of its shapes (zeros between
dilated pixels included), beside those of the product of two large matrices.
"""

import collections
import dataclasses
import math
import os
import re
import tempfile
import time
from pathlib import Path

import _measure

from vqvae_jax.config import PRIOR_PRESETS, PriorConfig

MATRIX = 2048
WHAT = ("training", "encode", "decode", "prior", "sampling")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\S+) (.*)$")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)[,)]")
_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.\-]+)")
_KIND = re.compile(r"[.\d]+$")


def convolutions(program: str) -> dict[str, float]:
    """FLOPs of each convolution of a compiled program (HLO text), by the name of the op that runs it."""
    shapes, flops, called_by, computation = {}, {}, {}, ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.removeprefix("ENTRY ").lstrip("%").split()[0]
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, shape, rest = match.groups()
        dims = _SHAPE.match(shape)
        shapes[name] = [int(side) for side in dims[1].split(",") if side] if dims else []
        if rest.startswith("convolution("):
            kernel = shapes[_OPERAND.findall(rest.partition("(")[2])[1]]
            outputs = kernel[re.search(r"dim_labels=\w+_(\w+)->", rest)[1].index("o")]
            flops[name] = flops[computation] = 2 * math.prod(shapes[name]) * math.prod(kernel) / outputs
        for called in _CALLED.findall(rest):
            called_by[name] = called
    return flops | {name: flops[called] for name, called in called_by.items() if called in flops}


def seconds_by_op(folder: Path) -> dict[str, float]:
    """Seconds of each op of a trace, over all threads."""
    from jax.profiler import ProfileData  # noqa: PLC0415 - after the choice of platform

    seconds: dict[str, float] = collections.defaultdict(float)
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    if any(key == "hlo_op" for key, _ in event.stats):
                        seconds[event.name] += event.duration_ns / 1e9
    return seconds


def main() -> None:
    """Parses the flags, profiles, prints the table."""
    flags = _measure.parser(__doc__)
    _measure.add_model_flags(flags)
    flags.add_argument("--what", choices=WHAT, default="training", help="what is profiled")
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--steps", type=int, default=3, help="steps that are profiled, after two to warm up")
    flags.add_argument("--top", type=int, default=25, help="rows of the table")
    flags = flags.parse_args()
    os.environ |= _measure.platform_of(flags.device)
    if flags.device == "cpu":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    import _jax  # noqa: PLC0415 - after the choice of platform
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    config = _measure.preset_config(flags, flags.batch_size)
    prior = dataclasses.replace(PRIOR_PRESETS.get(flags.preset, PriorConfig()), batch_size=flags.batch_size)
    made = {
        "training": lambda: _jax.TrainingStep(config),
        "prior": lambda: _jax.PriorStep(config, prior),
        "sampling": lambda: _jax.Sampling(config, prior, flags.batch_size),
    }
    step = made.get(flags.what, lambda: _jax.Inference(config, flags.what))()
    flops = convolutions(step.compile().as_text()) if flags.what != "sampling" else {}
    for _ in range(2):
        jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            begin = time.perf_counter()
            for _ in range(flags.steps):
                jax.block_until_ready(step())
            a_step = (time.perf_counter() - begin) / flags.steps
        seconds = {name: total / flags.steps for name, total in seconds_by_op(Path(folder)).items()}
    square = jnp.ones((MATRIX, MATRIX), flags.dtype)
    product = 2 * MATRIX**3 / _measure.seconds_each(lambda: square @ square, jax.block_until_ready, 5) / 1e9
    print(f"{flags.what}: {_measure.described(config, losses=flags.what == 'training')}")
    rows = []
    for name in sorted(seconds, key=seconds.get, reverse=True)[: flags.top]:
        speed = f"{flops[name] / seconds[name] / 1e9:.0f}" if name in flops else "-"
        rows.append((name, seconds[name] * 1e3, f"{seconds[name] / sum(seconds.values()):.1%}", speed))
    _measure.print_table(("op", "ms a step", "of all ops", "GFLOP/s"), rows)
    kinds: dict[str, float] = collections.defaultdict(float)
    for name, total in seconds.items():
        kinds[_KIND.sub("", name)] += total
    print()
    of_kinds = sorted(kinds.items(), key=lambda pair: -pair[1])[:12]
    shares = [(kind, total * 1e3, f"{total / sum(kinds.values()):.1%}") for kind, total in of_kinds]
    print(_measure.table(("kind", "ms a step", "of all ops"), shares))
    of_ops = sum(seconds.values())
    print(f"\n{a_step * 1e3:.0f} ms a step, {flags.batch_size / a_step:.3g} images/s; {of_ops * 1e3:.0f} ms in ops")
    if flops:
        convolving = sum(seconds.get(name, 0) for name in flops)
        rate = sum(flops[name] for name in flops if name in seconds) / max(convolving, 1e-9) / 1e9
        print(
            f"{convolving / of_ops:.0%} in convolutions at {rate:.0f} GFLOP/s; a {MATRIX}-square product: {product:.0f}"
        )


if __name__ == "__main__":
    main()
