"""How good images are and how a codebook is used."""

from vqvae_jax.metrics.codes import code_entropy, codebook_usage, perplexity
from vqvae_jax.metrics.images import hfen, mae, perceptual_distance, psnr
from vqvae_jax.metrics.measure import measure
from vqvae_jax.metrics.similarity import SSIM_WINDOW, ms_ssim, ssim
from vqvae_jax.metrics.two_sets import kernel_distance, roc_area

__all__ = [
    "SSIM_WINDOW",
    "code_entropy",
    "codebook_usage",
    "hfen",
    "kernel_distance",
    "mae",
    "measure",
    "ms_ssim",
    "perceptual_distance",
    "perplexity",
    "psnr",
    "roc_area",
    "ssim",
]
