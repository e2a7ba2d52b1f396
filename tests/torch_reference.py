"""The published model and its training step in PyTorch, written from its description, to compare with.

Names are those of the published state dict. ``channels_last`` False is the published flattening of the
latents; True moves channels last, as this package does.
"""

import torch
from torch import nn
from torch.nn import functional as F

SLOPE = 0.2
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions added to their input, activation after the sum: [B, C, H, W] to the same."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.leaky_relu(self.bn1(self.conv1(x)), SLOPE)
        return F.leaky_relu(x + self.bn2(self.conv2(y)), SLOPE)


class SelfAttention(nn.Module):
    """Attention of each position to all others, weighed by ``gamma``, which starts at 0: [B, C, H, W] to the same."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)  # [B, queries, keys]
        return self.gamma * (value @ weights.transpose(1, 2)).view_as(x) + x


class Encoder(nn.Module):
    """Images [B, channels, H, W] to latents [B, dim, H / 4, W / 4]."""

    def __init__(self, channels, hidden, dim):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, hidden // 2, 4, 2, 1), nn.BatchNorm2d(hidden // 2)
        self.conv2, self.bn2 = nn.Conv2d(hidden // 2, hidden, 4, 2, 1), nn.BatchNorm2d(hidden)
        self.res_blocks = nn.Sequential(ResidualBlock(hidden), ResidualBlock(hidden))
        self.attention = SelfAttention(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, dim, 3, padding=1), nn.BatchNorm2d(dim)

    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(x)), SLOPE)
        x = F.leaky_relu(self.bn2(self.conv2(x)), SLOPE)
        return self.bn3(self.conv3(self.attention(self.res_blocks(x))))


class Decoder(nn.Module):
    """Latents [B, dim, H / 4, W / 4] to images [B, channels, H, W] in [0, 1]."""

    def __init__(self, channels, hidden, dim):
        super().__init__()
        self.conv1, self.bn1 = nn.ConvTranspose2d(dim, hidden, 3, 1, 1), nn.BatchNorm2d(hidden)
        self.attention = SelfAttention(hidden)
        self.res_blocks = nn.Sequential(ResidualBlock(hidden), ResidualBlock(hidden))
        self.conv2, self.bn2 = nn.ConvTranspose2d(hidden, hidden // 2, 4, 2, 1), nn.BatchNorm2d(hidden // 2)
        self.conv3 = nn.ConvTranspose2d(hidden // 2, channels, 4, 2, 1)

    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(x)), SLOPE)
        x = self.res_blocks(self.attention(x))
        x = F.leaky_relu(self.bn2(self.conv2(x)), SLOPE)
        return torch.sigmoid(self.conv3(x))


class VectorQuantizer(nn.Module):
    """Latents [B, D, h, w] to those of the nearest codes (straight-through), the loss, and indices [B, h, w]."""

    def __init__(self, codes, dim, commitment, channels_last):
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        self.commitment, self.channels_last = commitment, channels_last

    def forward(self, z):
        rows = z.permute(0, 2, 3, 1).contiguous() if self.channels_last else z
        flat = rows.view(-1, self.embedding.weight.shape[1])
        indices = torch.cdist(flat, self.embedding.weight, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        quantized = self.embedding(indices).view_as(rows)
        if self.channels_last:
            quantized = quantized.permute(0, 3, 1, 2)
        loss = F.mse_loss(quantized, z.detach()) + self.commitment * F.mse_loss(quantized.detach(), z)
        return z + (quantized - z).detach(), loss, indices.view(len(z), *z.shape[2:])


class VQVAE(nn.Module):
    """Images [B, channels, H, W] to their reconstructions, the loss of the quantizer, and indices [B, H / 4, W / 4]."""

    def __init__(self, *, channels=1, hidden=256, dim=128, codes=1024, commitment=0.25, channels_last=False):
        super().__init__()
        self.encoder = Encoder(channels, hidden, dim)
        self.quantizer = VectorQuantizer(codes, dim, commitment, channels_last)
        self.decoder = Decoder(channels, hidden, dim)

    def forward(self, x):
        quantized, loss, indices = self.quantizer(self.encoder(x))
        return self.decoder(quantized), loss, indices


def vgg_features(weights, images, depth=7):
    """relu3_3 of VGG16 for grey images [N, 1, H, W] in [0, 1]; ``weights`` by torchvision's names."""
    x = (images.repeat(1, 3, 1, 1) - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        1, 3, 1, 1
    )
    for count, number in enumerate((0, 2, 5, 7, 10, 12, 14)[:depth]):
        if count in (2, 4):
            x = F.max_pool2d(x, 2)
        x = F.relu(F.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1))
    return x


def losses(model, images, weights, perceptual_weight=0.1):
    """Total, reconstruction, perceptual and quantizer loss of a batch, and the codes."""
    reconstruction, quantizer, indices = model(images)
    l1 = F.l1_loss(reconstruction, images)
    perceptual = F.l1_loss(vgg_features(weights, reconstruction), vgg_features(weights, images).detach())
    return l1 + perceptual_weight * perceptual + quantizer, l1, perceptual, quantizer, indices


def randomise(model):
    """Gives a model weights that exercise everything: gammas that are not 0, statistics that are not fresh."""
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(value, 0.5)
        if ".bn" in name:
            nn.init.uniform_(value, 0.5, 1.5) if name.endswith("weight") else nn.init.uniform_(value, -0.3, 0.3)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.uniform_(-0.3, 0.3)
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    # Codes near the latents, so that many of them are used.
    nn.init.normal_(model.quantizer.embedding.weight)
    return model
