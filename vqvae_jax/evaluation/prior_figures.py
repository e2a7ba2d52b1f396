"""What is told of a run's prior: bits of a split's codes, and how its samples compare with real slices."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from vqvae_jax.config import Config
from vqvae_jax.data.loader import Slices
from vqvae_jax.evaluation import pictures
from vqvae_jax.runtime.files import write_whole
from vqvae_jax.training.state import Variables

BITS, SAMPLES = "prior_bits.npy", "samples.png"


@dataclasses.dataclass(frozen=True, eq=False)
class SampleFigures:
    """How samples of a prior compare with test slices, and training slices with them.

    Attributes:
      count: how many samples there are.
      kernel_distance, kernel_distance_real: `metrics.kernel_distance` to test slices of samples, and of training
        slices, on the perceptual network's features; NaN without trained weights.
      ms_ssim, ms_ssim_real: mean MS-SSIM of pairs of samples, and of pairs of test slices.
      near_training: the share of samples that are nearer to a training slice than 95 % of rebuilt test slices are.
      pairs: some samples [N, H, 2 W], each beside its nearest training slice along the second axis.
    """

    count: int
    kernel_distance: float
    kernel_distance_real: float
    ms_ssim: float
    ms_ssim_real: float
    near_training: float
    pairs: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class PriorFigures:
    """``bits`` float [N, h, w] of each code of a split, in its order, and the figures of samples, if any were drawn."""

    bits: np.ndarray
    samples: SampleFigures | None = None

    def summary(self, codes_per_pixel: float) -> dict[str, float]:
        """Every scalar by name."""
        mean = float(self.bits.mean())
        found = {"prior_bits_per_code": mean, "prior_bits_per_pixel": codes_per_pixel * mean}
        if self.samples:
            values = dataclasses.asdict(self.samples)
            found |= {f"samples_{name}": value for name, value in values.items() if name != "pairs"}
        return found

    def describe(self, summary: dict[str, float]) -> Iterator[str]:
        """Lines for people."""
        yield (
            f"By the prior: {summary['prior_bits_per_code']:.3f} bits a code, bits per pixel: "
            f"{summary['prior_bits_per_pixel']:.4f}"
        )
        if self.samples is None:
            return
        of = self.samples
        distance = "no trained VGG16 weights at hand to compare their features"
        if not np.isnan(of.kernel_distance):
            distance = f"kernel distance to test slices {of.kernel_distance:.4f} (training slices: "
            distance += f"{of.kernel_distance_real:.4f})"
        yield (
            f"{of.count} samples: {distance}; MS-SSIM of two samples {of.ms_ssim:.4f} (of two test slices: "
            f"{of.ms_ssim_real:.4f})"
        )
        yield (
            f"Nearer to a training slice than 95 % of rebuilt test slices are: {of.near_training:.1%} of the samples "
            "(much above 5 %: the prior has memorized slices)"
        )

    def write(self, folder: Path) -> None:
        """Writes the bits of each code, float32, and the picture of samples beside their nearest training slices."""
        content = io.BytesIO()
        np.save(content, self.bits.astype(np.float32))
        write_whole(folder / BITS, content.getvalue())
        if self.samples:
            pictures.draw_grid(folder / SAMPLES, self.samples.pairs)


class MeasuresPrior(Protocol):
    """What looks at a run's prior, where it has one: a function of a room after this one."""

    def __call__(
        self,
        run_dir: Path,
        which: str,
        config: Config,
        variables: Variables,
        slices: Slices,
        *,
        with_samples: bool,
        log: Callable[[str], None],
    ) -> PriorFigures | None:
        """Figures of a split, by the prior over the codes of a run's checkpoint; None where there is no prior.

        Args:
          run_dir: the run's folder.
          which: the best checkpoint, or the newest.
          config: the run's configuration, with the data that ``slices`` are of.
          variables: the checkpoint's, on every device.
          slices: the split.
          with_samples: draw samples too, and compare them.
          log: is given lines for people.
        """
