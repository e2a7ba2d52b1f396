"""The reference's PyTorch recipe trained on your slices: its SSIM after as many steps as a run of this package.

    python benchmarks/reference.py --data SLICES --steps 144 --hidden-channels 32 --seeds 0 1 --out runs/reference
    python benchmarks/reference.py ... --picture runs/OURS

The recipe is tests/torch_reference.py: raw intensities, latents cut into vectors across channels, L1 + 0.1 perceptual
+ the quantizer's loss, Adam at 1e-4. Needs PyTorch (pip install -e .[torch]). Writes a picture and the weights of each
seed, which scripts/import_torch.py reads.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import _jax
import _measure
import _torch
import numpy as np
import torch
import tqdm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vqvae_jax import metrics
from vqvae_jax.config import PRESETS, Config
from vqvae_jax.data import grid, hip_mri, intensity, loader
from vqvae_jax.errors import ConfigError, DivergenceError
from vqvae_jax.evaluation import evaluate, pictures
from vqvae_jax.evaluation import reference_protocol as protocol
from vqvae_jax.evaluation.evaluator import Evaluator
from vqvae_jax.runtime.randomness import Purpose, integer_for

PROTOCOL, INTENSITIES, IMAGES = "reference protocol", "ours, output as intensities", "ours, output as [0, 1]"
_BATCH = 8
_DRAWN = 4
_PANEL = (3.4, 1.9)
"""Inches; slices are about twice as wide as high."""
_DPI = 100


class Intensities:
    """A split as the reference is trained on it: raw intensities float32 [1, H, W], resized."""

    def __init__(self, slices: loader.Slices):
        self._slices = slices

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, index: int) -> np.ndarray:
        return grid.fit(self._slices.sample(index).intensities, self._slices.image_shape[:2], "resize")[None]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model makes of each test slice, and its SSIMs.

    ``originals`` and ``outputs`` [N, 256, 256] in [0, 1] are what the reference protocol compares; ``images`` are the
    outputs [H, W] on the slices' own grids where the model is given raw intensities. ``ssim`` has, by name, each
    slice's SSIM [N].
    """

    originals: np.ndarray
    outputs: np.ndarray
    images: list[np.ndarray]
    ssim: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Ours:
    """A run's reconstruction [H, W] in [0, 1] of one test slice on its own grid, and its two SSIMs."""

    sample: loader.Sample
    image: np.ndarray
    by_protocol: float
    by_ours: float


def train(
    config: Config, steps: int, slices: loader.Slices, features: _torch.Features | None
) -> _torch.torch_reference.VQVAE:
    """The reference model after some steps, on the batches that a run of this package has with the same seed."""
    seed = config.training.seed
    torch.manual_seed(seed)
    model = _torch.reference(config.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    batches = loader.TrainLoader(Intensities(slices), config.training.batch_size, integer_for(seed, Purpose.ORDER))
    for step in tqdm.trange(steps, desc=f"Training, seed {seed}", unit="step", leave=False, disable=None):
        images = torch.from_numpy(np.array(next(batches)))
        total = _torch.total_loss(model, features, images, config.loss.perceptual_weight)
        if not torch.isfinite(total):
            raise DivergenceError(f"the loss is {total.item()} at step {step}; use a smaller --learning-rate")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
    return model.eval()


def reconstruct(model: _torch.torch_reference.VQVAE, images: Sequence[np.ndarray]) -> np.ndarray:
    """The model's images of [H, W], in batches: float32 [N, H, W]."""
    with torch.inference_mode():
        inputs = torch.from_numpy(np.stack(images)[:, None])
        return np.concatenate([model(batch)[0][:, 0].numpy() for batch in inputs.split(_BATCH)])


def score(model: _torch.torch_reference.VQVAE, slices: loader.Slices) -> Scores:
    """The SSIMs of every slice.

    By the reference protocol the model is given the z-scored slice, and its output, clipped, is compared with that at
    256 x 256. By this package's metrics it is given what it was trained on. Its output is then taken once for what it
    was trained to give, intensities, which are scaled to [0, 1] (a sigmoid's are all but black), and once for an image
    in [0, 1], which is kinder.
    """
    size = slices.image_shape[:2]
    samples = [slices.sample(index) for index in range(len(slices))]
    raw = [sample.intensities for sample in samples]
    outputs = reconstruct(model, [grid.fit(protocol.z_score(x, x), size, "resize") for x in raw])
    outputs = np.clip([grid.fit(output, protocol.SIZE, "resize") for output in outputs], 0, 1)
    originals = np.stack([protocol.to_compare(x, x) for x in raw])
    images = reconstruct(model, [grid.fit(x, size, "resize") for x in raw])
    images = [grid.fit(image, x.shape, "resize") for image, x in zip(images, raw, strict=True)]
    scaled = [intensity.scale(image, *sample.range) for image, sample in zip(images, samples, strict=True)]
    pixels = [sample.pixels for sample in samples]
    ssim = {PROTOCOL: _ssim(outputs, originals), INTENSITIES: _ssim(scaled, pixels), IMAGES: _ssim(images, pixels)}
    return Scores(originals, outputs, images, ssim)


def draw_protocol(path: Path, scores: Scores, slices: loader.Slices) -> None:
    """A picture of what the reference protocol compares: the first slices, and the best, the median and the worst."""
    rows = []
    for index, label in evaluate.chosen_slices(np.argsort(scores.ssim[PROTOCOL]).tolist()):
        sample = slices.sample(index)
        # In the slice's own proportions, though compared as squares.
        both = (scores.originals[index], scores.outputs[index])
        original, output = (grid.fit(image, sample.pixels.shape, "resize") for image in both)
        name = f"{label}: {Path(sample.file).name}, slice {sample.slice}"
        rows.append(pictures.Row(original, output, name, float(scores.ssim[PROTOCOL][index])))
    pictures.draw_reconstructions(path, rows)


def reconstruct_by_run(
    run_dir: Path, indices: Sequence[int] | None, slices: loader.Slices, data: str | None
) -> list[Ours]:
    """A run's reconstructions of some test slices, by default of a few over the whole split.

    Raises:
      ConfigError: the run's test slices are others, or there are fewer than an index says.
    """
    config, variables, own = evaluate.open_run(run_dir, "test", data=data, log=lambda line: None)
    if indices is None:
        indices = np.unique(np.linspace(0, len(slices) - 1, _DRAWN).astype(int)).tolist()
    if not all(0 <= index < len(slices) for index in indices):
        raise ConfigError(f"--slices {' '.join(map(str, indices))}: expected numbers from 0 to {len(slices) - 1}")
    if len(own) != len(slices):
        raise ConfigError(
            f"--picture {run_dir}: has {len(own)} test slices, not {len(slices)}; give a run of this --data"
        )
    found = Evaluator(config, own).run(variables, reference_protocol=True, keep=indices)
    ours = []
    for index in indices:
        sample, image = found.kept[index]
        if not np.array_equal(sample.intensities, slices.sample(index).intensities):
            raise ConfigError(f"--picture {run_dir}: its test slice {index} is another; give a run of this --data")
        ours.append(Ours(sample, image, found.reference[index], found.rows[index].ssim))
    return ours


def draw_beside(path: Path, run: str, ours: Sequence[Ours], scores: Scores) -> None:
    """A picture with a line a slice: original, the reference recipe's reconstruction, the run's; with both SSIMs."""
    figure = Figure(figsize=(3 * _PANEL[0], _PANEL[1] * len(ours)), layout="compressed")
    FigureCanvasAgg(figure)
    for line, own in zip(figure.subplots(len(ours), 3, squeeze=False), ours, strict=True):
        theirs, by_protocol, by_ours = (
            of[own.sample.index] for of in (scores.images, scores.ssim[PROTOCOL], scores.ssim[IMAGES])
        )
        titles = (
            f"{Path(own.sample.file).name}, slice {own.sample.slice}",
            f"reference recipe: SSIM {by_ours:.4f} ({by_protocol:.4f} by its protocol)",
            f"{run}: SSIM {own.by_ours:.4f} ({own.by_protocol:.4f} by the reference protocol)",
        )
        for panel, pixels, title in zip(line, (own.sample.pixels, theirs, own.image), titles, strict=True):
            panel.imshow(pixels.T, cmap="gray", vmin=0, vmax=1)
            panel.set_title(title, fontsize=7)
            panel.set_axis_off()
    figure.savefig(path, dpi=_DPI)


def _ssim(images: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> np.ndarray:
    """SSIM of each pair of [H, W], which may be of different sizes."""
    return metrics.measure(list(images), list(originals))["ssim"]


def parse() -> tuple[argparse.Namespace, Config]:
    """The flags, and the configuration that they make of the reference recipe's.

    Raises ConfigError where one cannot work.
    """
    flags = _measure.parser(__doc__)
    recipe = PRESETS["reference"]
    flags.add_argument("--data", help="as scripts/train.py takes it")
    flags.add_argument("--tfds-dir", default=recipe.data.tfds_dir, help="folder for the data set built from it")
    flags.add_argument("--out", type=Path, required=True, help="folder for pictures and weights")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--steps", type=int, default=144)
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--image-size", type=int, nargs=2, default=[256, 128], help="256 256 in the original")
    flags.add_argument("--hidden-channels", type=int, default=recipe.model.hidden_channels)
    flags.add_argument("--embedding-dim", type=int, default=recipe.model.embedding_dim)
    flags.add_argument("--num-embeddings", type=int, default=recipe.model.num_embeddings)
    flags.add_argument("--learning-rate", type=float, default=recipe.training.learning_rate, help="of Adam")
    flags.add_argument("--perceptual-weight", type=float, default=recipe.loss.perceptual_weight, help="0: no VGG16")
    flags.add_argument("--vgg-weights", default=recipe.loss.vgg_weights, help="as scripts/train.py takes it")
    flags.add_argument("--picture", type=Path, metavar="RUN", help="a run to draw beside the first seed's model")
    flags.add_argument("--slices", type=int, nargs="+", help="of the test split, for --picture")
    flags = flags.parse_args()
    changed = {}
    for part in ("model", "data", "loss", "training"):
        settings = getattr(recipe, part)
        names = {field.name for field in dataclasses.fields(settings)} & vars(flags).keys()
        changed[part] = dataclasses.replace(settings, **{name: getattr(flags, name) for name in names})
    return flags, dataclasses.replace(recipe, **changed)


def main() -> None:
    """Trains and scores every seed, draws, prints the table."""
    flags, config = parse()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    out = _measure.output_folder(flags.out)
    features = _torch.Features(_jax.vgg_arrays(config.loss.vgg_weights)) if config.loss.perceptual_weight else None
    size = config.model.image_size
    survey = hip_mri.look(config.data, size)
    training, test = loader.open_splits(survey, config.data, size, ("train", "test"))
    ours = reconstruct_by_run(flags.picture, flags.slices, test, flags.data) if flags.picture else None
    rows, found = [], []
    for seed in flags.seeds:
        begin = time.perf_counter()
        seeded = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
        model = train(seeded, flags.steps, training, features)
        seconds = time.perf_counter() - begin
        scores = score(model, test)
        torch.save(model.state_dict(), out / f"seed-{seed}.pth")
        draw_protocol(out / f"seed-{seed}.png", scores, test)
        if ours and not found:
            draw_beside(out / "beside.png", flags.picture.resolve().name, ours, scores)
        found.append((*(values.mean() for values in scores.ssim.values()), seconds))
        rows.append((f"seed {seed}", *found[-1]))
    rows.append(("mean", *map(statistics.mean, zip(*found, strict=True))))
    print()
    recipe = f"reference, width {config.model.hidden_channels}, {size[0]}x{size[1]}"
    cells = [(recipe, name, flags.steps, *(f"{x:.4f}" for x in means), f"{took:.0f}") for name, *means, took in rows]
    header = ("recipe", "seed", "steps", *(f"SSIM, {name}" for name in scores.ssim), "seconds of training")
    _measure.print_table(header, cells)
    how = f"batches of {config.training.batch_size}, Adam at {config.learning_rate:g}"
    print(f"\n{len(test)} test slices; {how}, perceptual weight {config.loss.perceptual_weight:g}. Written: {out}/")


if __name__ == "__main__":
    _measure.run(main)
