"""The PyTorch side: the tests' reference model and any preset's recipe, made no slower than PyTorch allows.

The reference differs from tests/torch_reference.py in speed alone: code distances come from a matrix product (the
exact ones take several times as long), and VGG's constants are made once, not each step. `Recipe` is the network and
`recipe_loss` the loss of a configuration of this package.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vqvae_jax.config import LossConfig, ModelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torch_reference

from vqvae_jax.models import quantizer as ours

SLOPE = torch_reference.SLOPE
SSIM_WINDOW, SSIM_C1, SSIM_C2 = 7, 0.01**2, 0.03**2


class Quantizer(torch_reference.VectorQuantizer):
    """The reference's quantizer, channels last, with distances by matrix product."""

    def indices(self, z: torch.Tensor) -> torch.Tensor:
        """Nearest codes [N, h, w] of latents [N, D, h, w]."""
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()
            codes = self.embedding.weight
            distances = torch.addmm(codes.square().sum(1), flat, codes.T, alpha=-2)
            return distances.argmin(1).view(len(z), *z.shape[2:])

    def forward(self, z):
        z = z.float()
        indices = self.indices(z)
        quantized = self.lookup(indices)
        loss = F.mse_loss(quantized, z.detach()) + self.commitment * F.mse_loss(quantized.detach(), z)
        return z + (quantized - z).detach(), loss, indices

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors [N, D, h, w]."""
        return self.embedding(indices).permute(0, 3, 1, 2)


def reference(config: ModelConfig, *, channels_last: bool = False) -> torch_reference.VQVAE:
    """The reference model of ``config``'s widths; ``channels_last`` cuts latents into vectors as this package does."""
    sizes = {"hidden": config.hidden_channels, "dim": config.embedding_dim, "codes": config.num_embeddings}
    return torch_reference.VQVAE(**sizes, channels_last=channels_last)


def fast_reference(config: ModelConfig) -> torch_reference.VQVAE:
    """``reference`` with channels last and this module's quantizer."""
    model = reference(config, channels_last=True)
    model.quantizer = Quantizer(config.num_embeddings, config.embedding_dim, model.quantizer.commitment, True)
    return model


class PreActivationBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): [N, C, H, W] to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        y = self.conv1(F.leaky_relu(self.bn1(x), SLOPE))
        return x + self.conv2(F.leaky_relu(self.bn2(y), SLOPE))


class EMAQuantizer(nn.Module):
    """The package's EMA codebook after its first batch: the same averages, constants and new places for dead codes."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.register_buffer("codebook", torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codebook.clone())

    def indices(self, flat: torch.Tensor) -> torch.Tensor:
        """Nearest codes [M] of vectors [M, D]."""
        with torch.no_grad():
            return torch.addmm(self.codebook.square().sum(1), flat, self.codebook.T, alpha=-2).argmin(1)

    def forward(self, flat):
        indices = self.indices(flat)
        codes = self.codebook[indices]
        if self.training:
            self._update(flat.detach(), indices)
        return flat + (codes - flat).detach(), ours.COMMITMENT_COST * F.mse_loss(codes, flat), indices

    @torch.no_grad()
    def _update(self, flat, indices):
        counts = torch.bincount(indices, minlength=len(self.codebook)).float()
        sums = torch.zeros_like(self.sums).index_add_(0, indices, flat)
        self.counts.lerp_(counts, 1 - ours.DECAY)
        self.sums.lerp_(sums, 1 - ours.DECAY)
        average = self.counts.mean()
        dead = self.counts < ours.DEAD_BELOW * average
        drawn = flat[torch.randint(len(flat), (len(self.codebook),), device=flat.device)]
        self.counts.copy_(torch.where(dead, average, self.counts))
        self.sums.copy_(torch.where(dead[:, None], average * drawn, self.sums))
        self.codebook.copy_(self.sums / self.counts[:, None])


class GradientQuantizer(nn.Module):
    """A codebook that is moved by its gradient."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))

    indices = EMAQuantizer.indices

    def forward(self, flat):
        indices = self.indices(flat)
        codes = self.codebook[indices]
        loss = F.mse_loss(codes, flat.detach()) + ours.COMMITMENT_COST * F.mse_loss(codes.detach(), flat)
        return flat + (codes - flat).detach(), loss, indices


class Recipe(nn.Module):
    """The network of a configuration of this package: images [N, 1, H, W] to reconstructions, the quantizer's loss."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(*_encoder(config)), nn.Sequential(*_decoder(config))
        kind = EMAQuantizer if config.codebook_update == "ema" else GradientQuantizer
        self.quantizer = kind(config.num_embeddings, config.codebook_dim)
        self.project_in = nn.Linear(config.embedding_dim, config.code_dim) if config.code_dim else nn.Identity()
        self.project_out = nn.Linear(config.code_dim, config.embedding_dim) if config.code_dim else nn.Identity()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Indices [N, h, w] of images."""
        latents = self._vectors(images)
        return self.quantizer.indices(latents.flatten(0, 2)).view(latents.shape[:3])

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """Images of indices [N, h, w]."""
        return self._images(self.quantizer.codebook[indices])

    def forward(self, images):
        latents = self._vectors(images)
        with torch.autocast(images.device.type, enabled=False):
            quantized, loss, _ = self.quantizer(latents.float().flatten(0, 2))
        return self._images(quantized.view(latents.shape)), loss

    def _vectors(self, images):
        latents = self.encoder(images).permute(0, 2, 3, 1)
        with torch.autocast(images.device.type, enabled=False):
            return self.project_in(latents.float())

    def _images(self, vectors):
        return self.decoder(self.project_out(vectors).permute(0, 3, 1, 2)).float().sigmoid()


def _normed(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE)]


def _blocks(config: ModelConfig) -> list[nn.Module]:
    width, blocks = config.hidden_channels, config.residual_blocks
    if config.residual == "post":
        return [torch_reference.ResidualBlock(width) for _ in range(blocks)]
    return [*(PreActivationBlock(width) for _ in range(blocks)), *(_normed(width) if blocks else [])]


def _encoder(config: ModelConfig) -> list[nn.Module]:
    width, layers, inputs = config.hidden_channels, [], 1
    for outputs in (width // 2, *[width] * (config.halvings - 1)):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), *_normed(outputs)]
        inputs = outputs
    layers += _blocks(config)
    layers += [torch_reference.SelfAttention(width)] if config.attention else []
    layers += [nn.Conv2d(width, config.embedding_dim, 3, padding=1)]
    return layers + ([nn.BatchNorm2d(config.embedding_dim)] if config.latent_norm else [])


def _decoder(config: ModelConfig) -> list[nn.Module]:
    width = config.hidden_channels
    layers = [nn.Conv2d(config.embedding_dim, width, 3, padding=1), *_normed(width)]
    layers += [torch_reference.SelfAttention(width)] if config.attention else []
    layers += _blocks(config)
    for outputs in (*[width] * (config.halvings - 2), width // 2):
        layers += [nn.ConvTranspose2d(width, outputs, 4, 2, 1), *_normed(outputs)]
    return [*layers, nn.ConvTranspose2d(width // 2, 1, 4, 2, 1)]


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean SSIM of images [N, 1, H, W] in [0, 1], with this package's window."""
    moments = F.avg_pool2d(torch.cat([a, b, a * a, b * b, a * b], 1), SSIM_WINDOW, stride=1)
    mean_a, mean_b, aa, bb, ab = moments.unbind(1)
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    var_a, var_b, cov = (sample * x for x in (aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b))
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    return (luminance * (2 * cov + SSIM_C2) / (var_a + var_b + SSIM_C2)).mean()


def recipe_loss(model: Recipe, features: "Features | None", images: torch.Tensor, weights: LossConfig) -> torch.Tensor:
    """The training loss of a configuration; ``features`` None leaves the perceptual term out."""
    reconstruction, total = model(images)
    pixels = F.l1_loss if weights.reconstruction == "l1" else F.mse_loss
    total = total + pixels(reconstruction, images)
    if weights.ssim_weight:
        total = total + weights.ssim_weight * (1 - ssim(reconstruction, images))
    if features is None:
        return total
    with torch.no_grad():
        target = features(images)
    return total + weights.perceptual_weight * F.l1_loss(features(reconstruction), target)


class Features(torch.nn.Module):
    """VGG16 to one layer with the arrays of ``_jax.vgg_arrays``."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        super().__init__()
        self.numbers = sorted(int(name.split(".")[1]) for name in arrays if name.endswith(".weight"))
        for number in self.numbers:
            for kind in ("weight", "bias"):
                self.register_buffer(f"{kind}{number}", torch.from_numpy(arrays[f"features.{number}.{kind}"]))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.from_numpy(arrays[name]).view(1, 3, 1, 1))

    def forward(self, images):
        x = (images - self.mean) / self.std
        for number in self.numbers:
            if number in (5, 10):  # the first convolutions of their blocks
                x = F.max_pool2d(x, 2)
            x = F.relu(F.conv2d(x, getattr(self, f"weight{number}"), getattr(self, f"bias{number}"), padding=1))
        return x


def total_loss(model, features, images, perceptual_weight):
    """The reference's training loss; ``features`` None leaves its perceptual term out."""
    reconstruction, quantizer, _ = model(images)
    total = F.l1_loss(reconstruction, images) + quantizer
    if features is None:
        return total
    with torch.no_grad():
        target = features(images)
    return total + perceptual_weight * F.l1_loss(features(reconstruction), target)


def wait(device: str) -> None:
    """Returns when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
