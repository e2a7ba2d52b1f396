"""What a run's prior saves: bytes of .vqz files by the simple coder and by the prior, at the same image.

    python benchmarks/prior_coding.py --workdir runs/NAME [--split test] [--slices 100]

Each volume of the split is a file, and each of so many slices by itself is one. Bytes are of whole files, headers
included. "Bits a code" counts the codes' share of them alone. The last table has the prior's bits by pass of the coding
order, and the frequencies' entropy for comparison. The seconds are of one run of each, compilation left out.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
from _measure import print_table, run

import vqvae_jax
from vqvae_jax.coding import entropy, prior_coder, vqz
from vqvae_jax.data import hip_mri, loader
from vqvae_jax.inference.beside_avif import file_of
from vqvae_jax.models.prior import coding_order
from vqvae_jax.runtime import compilation, runs
from vqvae_jax.training.checkpoint import load_variables
from vqvae_jax.training.prior_data import CodeSource
from vqvae_jax.training.step import replicate


def main() -> None:
    """Parses the flags, codes the split both ways, prints the tables."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--workdir", type=Path, required=True)
    flags.add_argument("--split", default="test")
    flags.add_argument("--slices", type=int, default=100, help="slices that are coded alone, spread over the split")
    flags = flags.parse_args()
    compilation.use_cache()
    config = runs.load_config(flags.workdir)
    model = vqvae_jax.load(flags.workdir)
    survey = hip_mri.look(config.data, config.model.image_size)
    (slices,) = loader.open_splits(survey, config.data, config.model.image_size, [flags.split])
    source = CodeSource(config, replicate(load_variables(flags.workdir, config)), slices, 1, 0)
    codes = source.plain().indices
    volumes = list(source.volumes())
    chosen = np.unique(np.linspace(0, len(codes) - 1, min(flags.slices, len(codes))).astype(int))
    sets = {f"{len(volumes)} volumes": volumes, f"{len(chosen)} slices alone": [np.array([one]) for one in chosen]}
    size, num_embeddings, prior = slices.sample(0).intensities.shape, config.model.num_embeddings, model.prior
    for some in (volumes[0][:1], volumes[0]):  # compiles
        prior_coder.bits(codes[some], prior)
    rows, seconds = [], {"encode": 0.0, "decode": 0.0}
    for name, places in sets.items():
        files = [file_of(codes[place], size, model) for place in places]
        began = time.perf_counter()
        by_prior = [vqz.prior_to_bytes(file, prior) for file in files]
        encoded = time.perf_counter()
        for content, place in zip(by_prior, places, strict=True):
            found = vqz.from_bytes(content, prior).encoded.images.indices
            assert np.array_equal(found, codes[place])
        decoded = time.perf_counter()
        if name.endswith("volumes"):
            seconds = {"encode": encoded - began, "decode": decoded - encoded}
        simple = [vqz.to_bytes(file) for file in files]
        count = sum(map(len, places))
        of_codes = 8 / (count * codes[0].size)
        pixels = count * math.prod(size)
        payloads = {
            "simple coder": sum(len(entropy.encode(codes[place], num_embeddings)[0]) for place in places),
            "prior": sum(len(part) for place in places for part in prior_coder.encode(codes[place], prior)),
        }
        base = sum(map(len, simple))
        rows.append((name, "plain packing", math.log2(num_embeddings), "-", "-", "-"))
        for coder, contents in (("simple coder", simple), ("prior", by_prior)):
            total = sum(map(len, contents))
            rows.append(
                (
                    name,
                    coder,
                    f"{payloads[coder] * of_codes:.3f}",
                    f"{8 * total / pixels:.4f}",
                    total,
                    f"{1 - total / base:.1%}",
                )
            )
    print_table(("what", "coder", "bits a code", "bits a pixel, whole files", "bytes", "saved"), rows)
    everything = sum(map(len, volumes))
    print(", ".join(f"{name}: {everything / value:.2f} slices/s" for name, value in seconds.items()))
    order = coding_order(*codes.shape[1:])
    bits = {
        "given the slices before": np.concatenate([prior_coder.bits(codes[place], prior) for place in volumes]),
        "alone": prior_coder.bits(codes[chosen], prior, alone=True),
    }
    table = [
        (
            name,
            f"{found.mean():.3f}",
            " ".join(f"{found[:, order == number].mean():.2f}" for number in np.unique(order)),
        )
        for name, found in bits.items()
    ]
    print_table(("prior", "bits a code", "by pass"), table)
    shares = np.bincount(codes.ravel(), minlength=num_embeddings) / codes.size
    print(f"entropy of the codes' frequencies in this split: {-sum(p * math.log2(p) for p in shares if p):.3f}")


if __name__ == "__main__":
    run(main)
