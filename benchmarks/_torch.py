"""The PyTorch side: the tests' reference model and its loss, made no slower than PyTorch allows.

Two things differ from tests/torch_reference.py in speed alone: code distances come from a matrix product
(the reference's exact ones take several times as long), and VGG's constants are made once, not each step.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from vqvae_jax.config import ModelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torch_reference


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


class Features(torch.nn.Module):
    """VGG16 to relu3_3 with the arrays of ``_jax.vgg_arrays``."""

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
