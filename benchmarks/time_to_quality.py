"""Seconds of training until the validation split's mean SSIM passes a mark: a preset against the reference recipe.

    python benchmarks/time_to_quality.py --data SLICES --image-size 128 64 --hidden-channels 32 --mark 0.80

``jax`` is a preset of this package. ``torch`` is the published recipe in PyTorch, eager, with its two mistakes mended:
intensities scaled to [0, 1], and latents cut into vectors across channels. Its network is as wide, its loss and rate
are the published ones; ``--no-vgg`` leaves the perceptual term out of both. Both see the same batches.

Time begins with the first step and counts compilation. Validation, once an epoch, is not counted. Slices are resized
to ``--image-size``, and SSIM (7 x 7 window, data_range 1) is taken there.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable

import _measure
import numpy as np

from vqvae_jax.config import Config

_EVALUATED_AT_ONCE = 16


def recipe(flags, preset: str) -> Config:
    """A preset with the flags' sizes, data and rate."""
    flags = argparse.Namespace(**vars(flags) | {"preset": preset})
    config = _measure.preset_config(flags, flags.batch_size)
    data = dataclasses.replace(config.data, data=flags.data, fit="resize")
    loss = dataclasses.replace(config.loss, vgg_weights=flags.vgg_weights)
    training = dataclasses.replace(config.training, epochs=flags.epochs, seed=flags.seed)
    if flags.learning_rate and preset == flags.preset:
        training = dataclasses.replace(training, learning_rate=flags.learning_rate)
    return dataclasses.replace(config, data=data, loss=loss, training=training)


def open_data(config: Config) -> tuple:
    """The stream of training batches, and all validation images [N, H, W, 1]."""
    from vqvae_jax.data import hip_mri, loader  # noqa: PLC0415 - after the choice of platform
    from vqvae_jax.runtime.randomness import Purpose, integer_for  # noqa: PLC0415

    size, training = config.model.image_size, config.training
    survey = hip_mri.look(config.data, size)
    train, validation = loader.open_splits(survey, config.data, size, ("train", "validation"), lambda line: None)
    batches = loader.TrainLoader(train, training.batch_size, integer_for(training.seed, Purpose.ORDER))
    return batches, np.stack([validation[index] for index in range(len(validation))])


def race(flags, data: tuple, step: Callable[[np.ndarray], None], images_of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Trains until the mark or the last epoch; reports seconds and steps, and the best SSIM.

    Args:
      flags: the benchmark's.
      data: as ``open_data`` returns it.
      step: takes one step on images [B, H, W, 1], and waits for it.
      images_of: reconstructions of images, both [N, H, W, 1].
    """
    from vqvae_jax import metrics  # noqa: PLC0415

    (batches, validation), best, seconds = data, 0.0, 0.0
    for epoch in range(flags.epochs):
        begin = time.perf_counter()
        for _ in range(batches.steps_per_epoch):
            step(next(batches))
        seconds += time.perf_counter() - begin
        starts = range(0, len(validation), _EVALUATED_AT_ONCE)
        found = np.concatenate([images_of(validation[start : start + _EVALUATED_AT_ONCE]) for start in starts])
        ssim = float(np.mean(metrics.ssim(np.float32(found[..., 0]), validation[..., 0])))
        best, steps = max(best, ssim), (epoch + 1) * batches.steps_per_epoch
        print(f"{flags.worker}: epoch {epoch + 1}, {steps} steps, {seconds:.0f} s, SSIM {ssim:.4f}", file=sys.stderr)
        if ssim >= flags.mark or seconds > flags.limit:
            break
    _measure.report(seconds=seconds, steps=steps, best=best, reached=best >= flags.mark)


def run_jax(flags) -> None:
    """Trains a preset of this package."""
    import jax  # noqa: PLC0415 - after the choice of platform

    from vqvae_jax.models import vgg_weights  # noqa: PLC0415
    from vqvae_jax.training import step as steps  # noqa: PLC0415
    from vqvae_jax.training.state import create_train_state  # noqa: PLC0415

    config = recipe(flags, flags.preset)
    data = open_data(config)
    vgg = None
    if config.loss.perceptual_weight:
        vgg = steps.replicate(vgg_weights.load(config.loss.vgg_weights, *config.loss.perceptual_layers))
    state = steps.replicate(create_train_state(config, data[0].batches_per_epoch))
    train_step, eval_step = steps.make_train_step(config), steps.make_eval_step(config)

    def step(images: np.ndarray) -> None:
        nonlocal state
        state, metrics = train_step(state, steps.split_over_devices(images), vgg)
        jax.block_until_ready(metrics)

    def images_of(images: np.ndarray) -> np.ndarray:
        mask = np.ones(len(images), np.float32)
        output = eval_step(state.variables, steps.split_over_devices(images), steps.split_over_devices(mask))
        return np.asarray(output.reconstruction).reshape(images.shape)

    race(flags, data, step, images_of)


def run_torch(flags) -> None:
    """Trains the mended reference recipe."""
    import _jax  # noqa: PLC0415
    import _torch  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(flags.seed)
    config = recipe(flags, "reference")
    device = "cuda" if flags.device == "gpu" else "cpu"
    model, features = _torch.fast_reference(config.model).to(device), None
    if config.loss.perceptual_weight:
        features = _torch.Features(_jax.vgg_arrays(config.loss.vgg_weights)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)

    def tensor(images: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)

    def step(images: np.ndarray) -> None:
        model.train()
        total = _torch.total_loss(model, features, tensor(images), config.loss.perceptual_weight)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        _torch.wait(device)

    def images_of(images: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            return model(tensor(images))[0].cpu().numpy().transpose(0, 2, 3, 1)

    race(flags, open_data(config), step, images_of)


def main() -> None:
    """Parses the flags; runs both and prints the table, or is one worker."""
    flags = _measure.timing_parser(__doc__)
    _measure.add_model_flags(flags)
    flags.set_defaults(rounds=1)
    flags.add_argument("--data", required=True, help="as scripts/train.py takes it")
    flags.add_argument("--mark", type=float, default=0.80, help="SSIM to pass")
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--epochs", type=int, default=100, help="at most; a cosine schedule ends with the last")
    flags.add_argument("--limit", type=float, default=1800, help="seconds after which a contender gives up")
    flags.add_argument("--learning-rate", type=float, help="of the preset; its own by default")
    flags.add_argument("--vgg-weights", default="auto", help="as scripts/train.py takes it")
    flags.add_argument("--seed", type=int, default=0)
    flags = flags.parse_args()
    if flags.worker:
        return run_jax(flags) if flags.worker == "jax" else run_torch(flags)
    config = recipe(flags, flags.preset)
    print(_measure.described(config), flush=True)
    names = ("jax", "torch")
    results = _measure.alternate(__file__, names, flags.rounds, **_measure.platform_of(flags.device))
    rows = []
    for name, records in results.items():
        reached = all(record["reached"] for record in records)
        seconds, steps = (_measure.median(records, key) for key in ("seconds", "steps"))
        cells = (f"{seconds:.0f}", f"{steps:.0f}") if reached else (f"not in {seconds:.0f}", f"not in {steps:.0f}")
        rows.append((name, flags.mark, *cells, f"{_measure.median(records, 'best'):.4f}"))
    _measure.print_table(("contender", "SSIM to pass", "seconds", "steps", "best SSIM"), rows)
    return None


if __name__ == "__main__":
    _measure.run(main)
