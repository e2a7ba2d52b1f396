"""What each option of the recipe brings: training runs that differ in it alone, several seeds, test split, one table.

    python benchmarks/ablation.py --data SLICES --out runs/ablation --seeds 2 -- --epochs 6 --hidden-channels 32

What follows ``--`` are flags of scripts/train.py for every run, so that all take equally many steps. The first rows
add one change after another; the others each add theirs to all of those. Runs that are done already (their folder in
``--out`` has test metrics) are not repeated, so that the command can be stopped and given again.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _measure

ADDED = {
    "`hipmri`": (),
    "EMA codebook": ("--codebook-update", "ema"),
    "no norm on the latents": ("--no-latent-norm",),
    "SSIM term": ("--ssim-weight", "0.5"),
    "warm-up and cosine": ("--schedule", "cosine", "--warmup-steps", "20"),
    "averaged weights": ("--average-decay", "0.98"),
}
"""Each with all above it."""
ALTERNATIVES = {
    "rotation trick": ("--gradient-estimator", "rotation"),
    "cosine codes": ("--cosine-codes",),
    "codes of width 16": ("--code-dim", "16"),
    "entropy term": ("--entropy-weight", "0.1"),
    "L2": ("--reconstruction", "l2"),
    "Charbonnier": ("--reconstruction", "charbonnier"),
    "MS-SSIM for SSIM": ("--ssim-weight", "0", "--ms-ssim-weight", "0.5"),
    "AdamW": ("--weight-decay", "0.01"),
    "flips": ("--flip",),
    "flips, small moves, gamma": ("--flip", "--rotation", "5", "--zoom", "0.05", "--shift", "0.02", "--gamma", "0.1"),
}
"""Each with all of ADDED."""
METRICS = ("ssim", "ms_ssim", "psnr", "codebook_usage", "bits_per_pixel", "bits_per_pixel_entropy")


def recipes() -> dict[str, tuple[str, ...]]:
    """Name -> flags of every row."""
    found, flags = {}, ()
    for name, more in ADDED.items():
        flags += more
        found[name if not more else f"+ {name}"] = flags
    return found | {f"all of these, {name}": flags + more for name, more in ALTERNATIVES.items()}


def train(folder: Path, flags: list[str]) -> dict[str, float]:
    """Test metrics of a run in ``folder``, and the seconds it took; trained unless that was done before."""
    done, took = folder / "eval/test/metrics.json", folder / "seconds.json"
    if not took.is_file():
        begin = time.perf_counter()
        command = [sys.executable, _measure.ROOT / "scripts/train.py", "--workdir", folder, *flags]
        resume = ["--resume"] if (folder / "config.json").is_file() else []
        status = subprocess.run([*map(str, command), *resume], stdout=subprocess.DEVNULL, check=False).returncode
        if status or not done.is_file():
            sys.exit(f"ablation.py: {folder} did not finish (status {status}); give the command again to go on")
        took.write_text(json.dumps(time.perf_counter() - begin))
    return json.loads(done.read_text()) | {"seconds": json.loads(took.read_text())}


def main() -> None:
    """Parses the flags, trains what is missing, prints the table."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--data", required=True, help="as scripts/train.py takes it")
    flags.add_argument("--out", type=Path, required=True, help="folder for the runs")
    flags.add_argument("--seeds", type=int, default=2)
    flags.add_argument("--only", default="", help="regular expression found in the names of the rows to run")
    own, shared = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, shared = own[:cut], own[cut + 1 :]
    flags = flags.parse_args(own)
    rows = []
    for name, changes in recipes().items():
        if not re.search(flags.only, name):
            continue
        slug = re.sub(r"\W+", "-", name).strip("-")
        runs = []
        for seed in range(flags.seeds):
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            everything = ["--data", flags.data, "--tfds-dir", str(flags.out / "tfds"), "--seed", str(seed)]
            runs.append(train(flags.out / f"{slug}-{seed}", [*everything, *changes, *shared]))
        row = [name]
        for metric in METRICS:
            values = [run[metric] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if metric == "ssim" and len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.4f}{spread}")
        rows.append((*row, f"{statistics.mean(run['seconds'] for run in runs):.0f}"))
    header = ("recipe", "SSIM", "MS-SSIM", "PSNR, dB", "codes used", "bits a pixel", "by entropy", "seconds")
    _measure.print_table(header, rows)
    print(f"\n{flags.seeds} seeds: mean ± standard deviation; every run with: {' '.join(shared) or 'no other flags'}")


if __name__ == "__main__":
    main()
