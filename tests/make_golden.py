"""Remake tests/golden.npz, what the PyTorch reference computes: python tests/make_golden.py."""

import numpy as np
import torch
from golden import GOLDEN, SIZE, STEPS, WIDTHS
from torch_reference import VQVAE, losses, randomise

from vqvae_jax.models import vgg16


def new_model(seed, **options):
    torch.manual_seed(seed)
    return randomise(VQVAE(hidden=WIDTHS["hidden"], dim=WIDTHS["dim"], codes=WIDTHS["codes"], **options))


def arrays(tensors, prefix):
    return {f"{prefix}{name}": value.detach().numpy().copy() for name, value in tensors}


def evaluated(name, size):
    """The published model in evaluation mode, on images of ``size``."""
    model = new_model(seed=1).eval()
    with torch.no_grad():
        images = torch.rand(2, 1, *size)
        # Codes near latents, so that many are used.
        rows = model.encoder(images).reshape(-1, WIDTHS["dim"])
        chosen = rows[torch.randperm(len(rows))[: WIDTHS["codes"]]]
        model.quantizer.embedding.weight.copy_(chosen + 0.1 * torch.randn_like(chosen))
        reconstruction, loss, codes = model(images)
    values = {"images": images, "reconstruction": reconstruction, "codes": codes, "quantizer_loss": loss}
    return arrays(values.items(), f"{name}/") | arrays(model.state_dict().items(), f"{name}/state/")


def vgg_weights():
    """The package's own untrained VGG16, under torchvision's names."""
    weights = {}
    for name, convolution in vgg16.random_variables("relu3_3")["params"].items():
        number = WIDTHS["vgg"][name]
        weights[f"features.{number}.weight"] = torch.tensor(np.asarray(convolution["kernel"]).transpose(3, 2, 0, 1))
        weights[f"features.{number}.bias"] = torch.tensor(np.asarray(convolution["bias"]))
    return weights


def trained():
    """Steps of Adam with clipping from known weights; losses of each, gradients of the first.

    From most seeds the path crosses a kink of L1 or a ReLU, where PyTorch itself ends 2e-4 away when started
    3e-8 away. From this one it ends 2e-7 away, so that a difference means something.
    """
    model = new_model(seed=7, channels_last=True).train()
    weights = vgg_weights()
    images = torch.rand(4, 1, *SIZE)
    found = arrays(model.state_dict().items(), "training/before/")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        *parts, codes = losses(model, images, weights)
        parts[0].backward()
        history.append([float(part.detach()) for part in parts])
        if step == 0:
            found |= arrays(((name, value.grad) for name, value in model.named_parameters()), "training/gradients/")
            found["training/codes"] = codes.numpy().copy()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found |= arrays(model.state_dict().items(), "training/after/")
    return found | {"training/images": images.numpy(), "training/losses": np.array(history)}


def compute():
    """Everything in the golden file, by name."""
    return evaluated("even", SIZE) | evaluated("straddling", (40, 24)) | trained()


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **compute())
    print(f"Written: {GOLDEN} ({GOLDEN.stat().st_size} bytes)")
