"""A yardstick that is not ours: a mean-scale hyperprior in PyTorch, trained on a run's slices (Minnen et al. 2018).

    python benchmarks/hyperprior.py --run runs/NAME --minutes 10 --weights 0.003 0.01 0.03 --out runs/hyperprior

arXiv:1809.02736 without its autoregressive part, for one channel and 64 wide, as CompressAI builds it but for the
hyper-latents, whose density here is one logistic distribution a channel. Loss: weight * 255^2 * MSE + bits a pixel.
Bits are those that an ideal coder needs for the rounded latents, without a file's header.
"""

import itertools
import time
from pathlib import Path

import _measure
import numpy as np
import torch
import tqdm
from torch import nn
from torch.nn import functional

from vqvae_jax import metrics
from vqvae_jax.data import loader
from vqvae_jax.data.grid import unfit
from vqvae_jax.evaluation.evaluate import open_run
from vqvae_jax.runtime.files import write_whole

WIDTH, LATENTS = 64, 96
LEARNING_RATE, CLIP = 1e-3, 1.0
LEAST_SCALE, LEAST_LIKELIHOOD = 0.11, 1e-9


class GDN(nn.Module):
    """Generalized divisive normalization (Balle et al. 2016, arXiv:1511.06281), or its inverse."""

    def __init__(self, channels: int, *, inverse: bool = False):
        super().__init__()
        self._inverse = inverse
        self.beta = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.sqrt(0.1 * torch.eye(channels) + 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x / sqrt(beta + gamma x^2) over channels, or times that root."""
        root = torch.sqrt(functional.conv2d(x**2, (self.gamma**2)[..., None, None], self.beta**2 + 1e-6))
        return x * root if self._inverse else x / root


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 5, 2, 2)


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 5, 2, 2, 1)


class MeanScaleHyperprior(nn.Module):
    """Images [N, 1, H, W], whose sides are multiples of 64, to reconstructions and bits [N]."""

    def __init__(self):
        super().__init__()
        n, m, act = WIDTH, LATENTS, nn.LeakyReLU
        self.analysis = nn.Sequential(_down(1, n), GDN(n), _down(n, n), GDN(n), _down(n, n), GDN(n), _down(n, m))
        upward = (GDN(n, inverse=True) for _ in range(3))
        self.synthesis = nn.Sequential(
            _up(m, n), next(upward), _up(n, n), next(upward), _up(n, n), next(upward), _up(n, 1)
        )
        self.hyper_analysis = nn.Sequential(nn.Conv2d(m, n, 3, 1, 1), act(), _down(n, n), act(), _down(n, n))
        self.hyper_synthesis = nn.Sequential(_up(n, m), act(), _up(m, m), act(), nn.Conv2d(m, 2 * m, 3, 1, 1))
        self.location = nn.Parameter(torch.zeros(n))
        self.log_scale = nn.Parameter(torch.zeros(n))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """While training, noise stands for rounding."""
        y = self.analysis(x)
        z = self._rounded(self.hyper_analysis(y), self.location[:, None, None])
        scale = torch.exp(self.log_scale)[:, None, None]
        centred = (z - self.location[:, None, None]) / scale
        likely = torch.sigmoid(centred + 0.5 / scale) - torch.sigmoid(centred - 0.5 / scale)
        mean, width = self.hyper_synthesis(z).chunk(2, 1)
        width = functional.softplus(width).clamp_min(LEAST_SCALE)
        y = self._rounded(y, mean)
        normal = torch.distributions.Normal(0.0, 1.0)
        distance = (y - mean).abs()
        of_y = normal.cdf((0.5 - distance) / width) - normal.cdf((-0.5 - distance) / width)
        bits = sum(-torch.log2(p.clamp_min(LEAST_LIKELIHOOD)).sum((1, 2, 3)) for p in (likely, of_y))
        return self.synthesis(y), bits

    def _rounded(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) - 0.5 if self.training else torch.round(x - mean) + mean


def train(
    slices: loader.Slices, weight: float, minutes: float, batch_size: int, seed: int
) -> tuple[MeanScaleHyperprior, int]:
    """A model trained for so long with Adam, whose rate falls as a cosine; and how many steps that was."""
    torch.manual_seed(seed)
    model = MeanScaleHyperprior()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    stream = loader.TrainLoader(slices, batch_size, seed)
    began, last = time.perf_counter(), 60 * minutes
    with tqdm.tqdm(desc=f"weight {weight}", unit="step", leave=False, disable=None) as bar:
        for step in itertools.count():
            share = (time.perf_counter() - began) / last
            if share >= 1:
                return model, step
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + np.cos(np.pi * share)) / 2
            images = torch.from_numpy(next(stream)).permute(0, 3, 1, 2)
            made, bits = model(images)
            loss = weight * 255**2 * functional.mse_loss(made, images) + bits.mean() / images[0].numel()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            bar.update()


def evaluate(model: MeanScaleHyperprior, slices: loader.Slices, fit: str) -> dict[str, float]:
    """Mean bits a pixel, SSIM and PSNR of a split, each slice on its own grid."""
    model.eval()
    bits, values, pixels = 0.0, {"ssim": [], "psnr": []}, 0
    with torch.no_grad():
        for place in range(len(slices)):
            original = slices.sample(place).pixels
            made, spent = model(torch.from_numpy(slices[place])[None, None, ..., 0])
            own = unfit(made[0, 0].clamp(0, 1).numpy(), original.shape, fit)
            bits, pixels = bits + float(spent.sum()), pixels + original.size
            similar = metrics.measure(own[None], original[None])
            for name, each in values.items():
                each.extend(similar[name].tolist())
    return {"bits_per_pixel": bits / pixels} | {name: float(np.mean(each)) for name, each in values.items()}


def main() -> None:
    """Parses the flags, trains a model for each weight, prints and writes the table."""
    flags = _measure.parser(__doc__)
    flags.add_argument("--run", type=Path, required=True, help="whose data and splits")
    flags.add_argument("--minutes", type=float, default=10, help="of training, for each weight")
    flags.add_argument("--weights", type=float, nargs="+", default=[0.003, 0.01, 0.03], help="of the distortion")
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, required=True, help="folder for the table")
    flags = flags.parse_args()
    out = _measure.output_folder(flags.out)
    config, _, training = open_run(flags.run, "train")
    _, _, test = open_run(flags.run, "test", log=lambda line: None)
    rows = []
    for weight in flags.weights:
        model, steps = train(training, weight, flags.minutes, flags.batch_size, flags.seed)
        found = evaluate(model, test, config.data.fit)
        row = (weight, steps, *(f"{found[name]:.4f}" for name in ("bits_per_pixel", "ssim")), f"{found['psnr']:.2f}")
        print(*row, flush=True)
        rows.append(row)
    text = _measure.table(("weight", "steps", "bits a pixel", "SSIM", "PSNR, dB"), rows)
    write_whole(out / "hyperprior.md", text + "\n")
    print(f"\n{flags.minutes:g} minutes each, seed {flags.seed}; {_measure.machine()}\n\n{text}")


if __name__ == "__main__":
    _measure.run(main)
