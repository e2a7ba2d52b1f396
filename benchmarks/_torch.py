"""The PyTorch side: the tests' reference model, made no slower than PyTorch allows.

Two things differ from tests/torch_reference.py in speed alone: code distances come from a matrix product
(the reference's exact ones take several times as long), and VGG's constants are made once, not each step.
"""

import sys
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


def build(config: ModelConfig) -> torch_reference.VQVAE:
    """The reference model of ``config``'s widths."""
    sizes = {"hidden": config.hidden_channels, "dim": config.embedding_dim, "codes": config.num_embeddings}
    model = torch_reference.VQVAE(**sizes, commitment=config.commitment_cost, channels_last=True)
    model.quantizer = Quantizer(config.num_embeddings, config.embedding_dim, config.commitment_cost, True)
    return model


class Features(torch.nn.Module):
    """VGG16 to relu3_3 with the kernels and biases of a file from ``numpy.savez``: name_kernel, name_bias."""

    def __init__(self, path: str):
        super().__init__()
        weights = np.load(path)
        self.names = sorted(name.removesuffix("_kernel") for name in weights if name.endswith("_kernel"))
        for name in self.names:
            kernel = torch.from_numpy(weights[f"{name}_kernel"].transpose(3, 2, 0, 1).copy())
            self.register_buffer(f"{name}_kernel", kernel)
            self.register_buffer(f"{name}_bias", torch.from_numpy(weights[f"{name}_bias"]))
        self.register_buffer("mean", torch.tensor(torch_reference.IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(torch_reference.IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, images):
        x = (images - self.mean) / self.std
        for name in self.names:
            if name in ("conv2_1", "conv3_1"):
                x = F.max_pool2d(x, 2)
            x = F.relu(F.conv2d(x, getattr(self, f"{name}_kernel"), getattr(self, f"{name}_bias"), padding=1))
        return x


def total_loss(model, features, images, perceptual_weight):
    """The reference's training loss."""
    reconstruction, quantizer, _ = model(images)
    with torch.no_grad():
        target = features(images)
    perceptual = F.l1_loss(features(reconstruction), target)
    return F.l1_loss(reconstruction, images) + perceptual_weight * perceptual + quantizer


def wait(device: str) -> None:
    """Returns when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
