"""SSIM, PSNR and bits of networks that were trained for equally many minutes: what the codes are best made by.

    python benchmarks/transforms.py --data SLICES --image-size 64 64 --hidden-channels 64 --minutes 2

Each row is the preset `hipmri` without its perceptual loss and without attention, changed in what its name says. Its
step is timed for 10 s first; the steps that fit into ``--minutes`` follow, or ``--steps``, under a cosine that ends
with them. With ``--learning-rates``, each network is trained at each rate.

Rows with stages quantize in turn what the stages before have left (residual vector quantization, Zeghidour et al.
2021, arXiv:2107.03312), each with a codebook of its own. They are tried here alone: the package has one stage.

Bits are the entropy of each stage's codes on the validation split, without contexts. A prior's are fewer.
"""

import argparse
import dataclasses
import itertools
import re
import sys
import time
from collections.abc import Iterator

import _measure
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import time_to_quality

from vqvae_jax import metrics
from vqvae_jax.config import PRESETS, Config
from vqvae_jax.models import vqvae
from vqvae_jax.models.quantizer import EMAVectorQuantizer, ProjectedQuantizer, QuantizerOutput, straight_through
from vqvae_jax.training import step as steps
from vqvae_jax.training.state import create_train_state

ROWS: dict[str, tuple[int, dict]] = {
    "x4": (1, {}),
    "x4, 4 blocks": (1, {"residual_blocks": 4}),
    "x4, attention": (1, {"attention": True}),
    "x4, width 96, 1 block": (1, {"hidden_channels": 96, "embedding_dim": 96, "residual_blocks": 1}),
    "x4, width 48, 4 blocks": (1, {"hidden_channels": 48, "embedding_dim": 48, "residual_blocks": 4}),
    "x4, 32 codes": (1, {"num_embeddings": 32}),
    "x4, 128 codes": (1, {"num_embeddings": 128}),
    "x8, 2 stages": (2, {"downsampling": 8}),
    "x8, 3 stages": (3, {"downsampling": 8}),
    "x8, 4 stages": (4, {"downsampling": 8}),
    "x8, 4 stages, 4 blocks": (4, {"downsampling": 8, "residual_blocks": 4}),
}
"""Row -> stages, and fields of ModelConfig. The widths named share out what the default width, 64, takes."""
WARMUP_STEPS = 30
_AT_ONCE = 16
_TIMED_AT_ONCE = 8
_TIMED_SECONDS = 10.0


class ResidualQuantizer(nn.Module):
    """Stages of EMA quantizers, each of what the ones before leave of latents [..., d].

    A call returns a ``QuantizerOutput`` whose ``indices`` are int32 [..., stages], and ``counts`` [stages K].
    """

    stages: int
    num_embeddings: int
    codebook_dim: int
    axis_name: str | None = None

    def setup(self):
        self.of_stages = [
            EMAVectorQuantizer(self.num_embeddings, self.codebook_dim, axis_name=self.axis_name)
            for _ in range(self.stages)
        ]

    def __call__(self, latents: jax.Array, *, train: bool = False) -> QuantizerOutput:
        rest, outputs = latents.astype(jnp.float32), []
        for stage in self.of_stages:
            outputs.append(stage(rest, train=train))
            rest = rest - jax.lax.stop_gradient(outputs[-1].quantized)
        total = sum(jax.lax.stop_gradient(output.quantized) for output in outputs)
        return QuantizerOutput(
            quantized=straight_through(latents.astype(jnp.float32), total),
            indices=jnp.stack([output.indices for output in outputs], axis=-1),
            latents=latents,
            loss=sum(output.loss for output in outputs),
            codebook_loss=jnp.float32(0),
            commitment_loss=sum(output.commitment_loss for output in outputs),
            counts=jnp.concatenate([output.counts for output in outputs]),
        )


def use_stages(stages: int) -> None:
    """Makes every model have so many stages from now on."""

    def make(config, axis_name=None):
        quantizer = ResidualQuantizer(stages, config.num_embeddings, config.codebook_dim, axis_name)
        return ProjectedQuantizer(quantizer, config.code_dim, config.embedding_dim)

    vqvae.make_quantizer = make


def row_config(flags: argparse.Namespace, changes: dict, rate: float | str, seed: int) -> Config:
    """The preset with the flags' sizes and a row's changes, at a learning rate."""
    config = PRESETS["hipmri"]
    sizes = {
        "image_size": tuple(flags.image_size),
        "hidden_channels": flags.hidden_channels,
        "embedding_dim": flags.hidden_channels,
        "num_embeddings": flags.num_embeddings,
        "attention": False,
    }
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **sizes | changes),
        data=dataclasses.replace(config.data, data=flags.data, tfds_dir=flags.tfds_dir),
        loss=dataclasses.replace(config.loss, perceptual_weight=0.0),
        training=dataclasses.replace(
            config.training,
            batch_size=flags.batch_size,
            learning_rate=rate,
            schedule=flags.schedule,
            warmup_steps=WARMUP_STEPS,
            epochs=1,
            seed=seed,
        ),
    )


def trained(config: Config, batches: Iterator[np.ndarray], minutes: float, number: int | None) -> tuple[dict, int]:
    """A model's variables after ``minutes`` of steps, compilation not counted, or after ``number``; and the number."""
    step = steps.make_train_step(config)

    def take(state, number: int):
        for _ in range(number):
            state, found = step(state, steps.split_over_devices(next(batches)), None)
        jax.block_until_ready(found)
        return state

    if number is None:
        state = take(steps.replicate(create_train_state(config, _TIMED_AT_ONCE)), 2)
        begin, timed = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < _TIMED_SECONDS:
            state, timed = take(state, _TIMED_AT_ONCE), timed + _TIMED_AT_ONCE
        number = max(WARMUP_STEPS + 1, int(60 * minutes * timed / spent))
        # The schedule ends with the last step: another state, and another program.
        step = steps.make_train_step(config)
    state = take(steps.replicate(create_train_state(config, number)), number)
    return state.variables, number


def measured(config: Config, variables: dict, images: np.ndarray) -> tuple[float, float, float]:
    """Mean SSIM and PSNR, and bits a pixel by entropy, of images [N, H, W, 1]."""
    model = vqvae.VQVAE(config.model)
    apply = jax.jit(lambda batch: model.apply(variables, batch))
    outputs = [jax.device_get(apply(images[start : start + _AT_ONCE])) for start in range(0, len(images), _AT_ONCE)]
    found = np.concatenate([output.reconstruction for output in outputs])[..., 0]
    indices = np.concatenate([output.quantizer.indices for output in outputs])
    stages = indices.reshape(*images.shape[:1], *config.model.latent_size, -1)
    each = [stages[..., stage].ravel() for stage in range(stages.shape[-1])]
    bits = sum(float(metrics.code_entropy(np.bincount(one))) for one in each)
    ssim = float(np.mean(metrics.ssim(np.float32(found), images[..., 0])))
    psnr = float(np.mean(metrics.psnr(np.float32(found), images[..., 0])))
    return ssim, psnr, bits / config.model.downsampling**2


def main() -> None:
    """Trains each row with each seed and prints the table."""
    flags = _measure.parser(__doc__)
    flags.add_argument("--data", required=True, help="as scripts/train.py takes it")
    flags.add_argument("--tfds-dir", default=PRESETS["hipmri"].data.tfds_dir, help="folder for the built data set")
    flags.add_argument("--image-size", type=int, nargs=2, default=(64, 64))
    flags.add_argument("--hidden-channels", type=int, default=64)
    flags.add_argument("--num-embeddings", type=int, default=512)
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--minutes", type=float, default=2.0, help="of training, for each row and seed")
    flags.add_argument("--steps", type=int, help="so many instead")
    flags.add_argument("--learning-rates", type=float, nargs="+", default=["auto"], help="by default hipmri's")
    flags.add_argument("--schedule", choices=("cosine", "steps"), default="cosine", help="steps: constant")
    flags.add_argument("--seeds", type=int, default=2)
    flags.add_argument("--only", default="", help="regular expression that the rows' names begin with")
    flags = flags.parse_args()
    rows, original = [], vqvae.make_quantizer
    for name in filter(re.compile(flags.only).match, ROWS):
        stages, changes = ROWS[name]
        vqvae.make_quantizer = original
        if stages > 1:
            use_stages(stages)
        for rate, seed in itertools.product(flags.learning_rates, range(flags.seeds)):
            config = row_config(flags, changes, rate, seed)
            batches, validation = time_to_quality.open_data(config)
            variables, number = trained(config, batches, flags.minutes, flags.steps)
            ssim, psnr, bits = measured(config, variables, validation)
            rows.append(
                (name, f"{config.learning_rate:.3g}", seed, number, f"{ssim:.4f}", f"{psnr:.2f}", f"{bits:.4f}")
            )
            print(*rows[-1], file=sys.stderr, flush=True)
    _measure.print_table(("network", "rate", "seed", "steps", "SSIM", "PSNR, dB", "bits a pixel, entropy"), rows)


if __name__ == "__main__":
    _measure.run(main)
