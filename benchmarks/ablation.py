"""What each option of the recipe brings: training runs that differ in it alone, several seeds, test split, one table.

    python benchmarks/ablation.py --data SLICES --out runs/ablation --seeds 2 -- --epochs 6 --hidden-channels 32

What follows ``--`` are flags of scripts/train.py for every run, so that all take equally many steps. The first rows
add one change after another; the others each add theirs to some or all of those. Runs that are done already (their
folder in ``--out`` has test metrics) are not repeated, so that the command can be stopped and given again.

``--shrink 2`` trains and tests on copies of the slices with half as many pixels along each axis, which a CPU goes
through several times as fast. ``--test-case case_0001`` tests on that patient's slices, and trains on those of the
test split, so that a few patients can be tested on in turn. The validation split, which says which epoch is tested,
stays: its patient may then be one of those trained on.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _measure
import nibabel
import numpy as np
from skimage.transform import resize

from vqvae_jax.config import DataConfig
from vqvae_jax.data import nifti, splits
from vqvae_jax.data.survey import Survey
from vqvae_jax.errors import ConfigError

COSINE = ("--schedule", "cosine", "--warmup-steps", "20")
MOVES = ("--rotation", "5", "--zoom", "0.05", "--shift", "0.02")
LAST_SHARED = "SSIM term"
ADDED = {
    "reference network and loss": (
        *("--codebook-update", "gradient", "--latent-norm", "--ssim-weight", "0", "--code-dim", "0"),
        *("--residual", "post", "--schedule", "steps", "--warmup-steps", "0"),
    ),
    "EMA codebook": ("--codebook-update", "ema"),
    "no norm on the latents": ("--no-latent-norm",),
    LAST_SHARED: ("--ssim-weight", "0.5"),
    "codes of width 16": ("--code-dim", "16"),
    "pre-activation": ("--residual", "pre"),
}
"""Each with all above it."""
ALTERNATIVES = {
    "pre-activation": ("--residual", "pre"),
    "twice the rate": ("--learning-rate", "2e-3"),
    "warm-up and cosine": COSINE,
    "warm-up and cosine, twice the rate": (*COSINE, "--learning-rate", "2e-3"),
    "SSIM term of weight 1": ("--ssim-weight", "1"),
    "L2": ("--reconstruction", "l2"),
    "perceptual term": ("--perceptual-weight", "0.1"),
    "four residual blocks": ("--residual-blocks", "4"),
    "no attention": ("--no-attention",),
    "flips": ("--flip",),
    "flips and small moves": ("--flip", *MOVES),
    "flips, small moves, gamma, bias field": ("--flip", *MOVES, "--gamma", "0.1", "--bias-field", "0.2"),
    "downsampling 8": ("--downsampling", "8"),
    "downsampling 16": ("--downsampling", "16"),
}
"""Each with ADDED up to LAST_SHARED."""
LONGER = {
    "warm-up and cosine": COSINE,
    "flips and small moves": ("--flip", *MOVES),
    "warm-up, cosine, flips and small moves": (*COSINE, "--flip", *MOVES),
    "warm-up, cosine, batches of 32 over 252 epochs": (*COSINE, "--batch-size", "32", "--epochs", "252"),
}
"""Each with all of ADDED: what is for longer training than tells the others apart. Only a cosine has room for many
epochs: the published schedule halves the rate every 20."""
UNDONE = {
    "gradient codebook": ADDED["reference network and loss"][:2],
    "norm on the latents": ("--latent-norm",),
    "no SSIM term": ("--ssim-weight", "0"),
    "L2": ("--reconstruction", "l2"),
    "four residual blocks": ("--residual-blocks", "4"),
    "no clipping": ("--gradient-clip", "0"),
    "512 codes": ("--num-embeddings", "512"),
    "2048 codes": ("--num-embeddings", "2048"),
    "latents of width 64": ("--embedding-dim", "64"),
    "batches of 2": ("--batch-size", "2"),
    "batches of 8, twice the epochs": ("--batch-size", "8", "--epochs", "57"),
    "downsampling 8": ("--downsampling", "8"),
    "bfloat16": ("--precision", "bfloat16"),
}
"""Each with all of ADDED, but for one default of `hipmri`. Two more are rows above: post-activation is
"+ codes of width 16", and codes of full width are "up to the SSIM term, pre-activation"."""
COSTLY = {
    "width 256": ("--hidden-channels", "256", "--embedding-dim", "128"),
    "perceptual term at relu2_2": ("--perceptual-weight", "0.1", "--perceptual-layers", "relu2_2"),
}
"""Each with all of ADDED: what small runs leave out for its time."""
RATES = {f"rate {rate}": ("--learning-rate", rate) for rate in ("1e-4", "3e-4", "1e-3", "1.2e-3", "4.8e-3")}
"""Each with all of ADDED. The first three are for width 256, the others half and twice what `hipmri` takes at 32."""
METRICS = ("ssim", "ms_ssim", "psnr", "codebook_usage", "bits_per_pixel", "bits_per_pixel_entropy")


def recipes() -> dict[str, tuple[str, ...]]:
    """Name -> flags of every row."""
    found, flags = {}, ()
    for name, more in ADDED.items():
        flags += more
        found[f"+ {name}" if found else name] = flags
    shared = found[f"+ {LAST_SHARED}"]
    found |= {f"up to the {LAST_SHARED}, {name}": shared + more for name, more in ALTERNATIVES.items()}
    found |= {f"all of these, but {name}": flags + more for name, more in UNDONE.items()}
    return found | {f"all of these, {name}": flags + more for name, more in (LONGER | COSTLY | RATES).items()}


def copy_slices(data: Path, folder: Path, factor: int, test_case: str | None = None) -> Path:
    """Copies the slices of ``data`` to ``folder`` with sides divided by ``factor``, anti-aliased.

    Its splits are kept, unless ``test_case`` is given: then that patient's slices are for testing, whatever split they
    were in, and the others' that were for testing are for training.

    Raises:
      ConfigError: ``data`` holds volumes, no slices of ``test_case``, or none of a split without it.
    """
    survey = Survey(data, DataConfig())
    split_of = {image.name: image.split for image in survey.images}
    if test_case is not None:
        for image in survey.images:
            if image.case == test_case:
                split_of[image.name] = "test"
            elif image.split == "test":
                split_of[image.name] = "train"
        cases = sorted({image.case for image in survey.images})
        if test_case not in cases:
            raise ConfigError(f"--test-case {test_case}: {data} has none of that patient, only {', '.join(cases)}")
        if empty := set(splits.SPLITS) - set(split_of.values()):
            raise ConfigError(f"--test-case {test_case}: leaves no slices for {min(empty)}; test on another patient")
    for image in survey.images:
        target = folder / splits.SPLIT_FOLDERS[split_of[image.name]] / image.name.replace("/", "_")
        if target.exists():
            continue
        piece, *others = nifti.slices(survey.read(image))
        if others:
            raise ConfigError(f"{data}: expected 2-D slices, but {image.name} is a volume")
        size = [side // factor for side in piece.pixels.shape]
        pixels = resize(piece.pixels, size, order=1, anti_aliasing=True, preserve_range=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(pixels.astype(np.float32), piece.affine * [factor, factor, 1, 1]), target)
    return folder


def claim(out: Path, settings: dict[str, object]) -> None:
    """Writes down in ``out`` what its runs are made of: data, slices, shared flags.

    Raises:
      ConfigError: it has runs made otherwise, which would be taken for these.
    """
    written = out / "ablation.json"
    out.mkdir(parents=True, exist_ok=True)
    before = json.loads(written.read_text()) if written.is_file() else settings
    if differing := [name for name, value in settings.items() if before.get(name) != value]:
        name = differing[0]
        raise ConfigError(
            f"--out {out}: its runs have {name} {before.get(name)!r}, not {settings[name]!r}; give another folder"
        )
    written.write_text(json.dumps(settings, indent=2))


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
    flags = _measure.parser(__doc__)
    flags.add_argument("--data", required=True, help="as scripts/train.py takes it")
    flags.add_argument("--out", type=Path, required=True, help="folder for the runs")
    flags.add_argument("--seeds", type=int, default=2)
    flags.add_argument("--shrink", type=int, default=1, help="divide the slices' sides by this")
    flags.add_argument("--test-case", help="patient to test on, such as case_0001, instead of the test split's")
    flags.add_argument("--only", default="", help="regular expression found in the names of the rows to run")
    own, shared = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, shared = own[:cut], own[cut + 1 :]
    flags = flags.parse_args(own)
    settings = {"data": str(Path(flags.data).absolute()), "shrink": flags.shrink, "test_case": flags.test_case}
    claim(flags.out, settings | {"flags": shared})
    if flags.shrink > 1 or flags.test_case:
        flags.data = str(copy_slices(Path(flags.data), flags.out / "slices", flags.shrink, flags.test_case))
    rows = []
    for name, changes in recipes().items():
        if not re.search(flags.only, name):
            continue
        slug = re.sub(r"\W+", "-", name).strip("-")
        runs = []
        for seed in range(flags.seeds):
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            everything = ["--data", flags.data, "--tfds-dir", str(flags.out / "tfds"), "--seed", str(seed)]
            runs.append(train(flags.out / f"{slug}-{seed}", [*everything, *shared, *changes]))
        row = [name]
        for metric in METRICS:
            values = [run[metric] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if metric in ("ssim", "psnr") and len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.4f}{spread}")
        rows.append((*row, f"{statistics.mean(run['seconds'] for run in runs):.0f}"))
    header = ("recipe", "SSIM", "MS-SSIM", "PSNR, dB", "codes used", "bits per pixel", "by entropy", "seconds")
    _measure.print_table(header, rows)
    tested = f"; tested on {flags.test_case}" if flags.test_case else ""
    print(f"\n{flags.seeds} seeds: mean ± standard deviation; slices shrunk by {flags.shrink}{tested}")
    print(f"Every run with: {' '.join(shared) or 'no other flags'}")


if __name__ == "__main__":
    _measure.run(main)
