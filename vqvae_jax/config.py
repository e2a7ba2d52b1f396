"""The settings of a run and the presets: frozen dataclasses.

Every field is also a flag of scripts/train.py under the same name (``hidden_channels`` is
``--hidden-channels``); the text below a field is that flag's help.
"""

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

from vqvae_jax.errors import require

LARGEST_FLOAT = sys.float_info.max
LARGEST_SEED = 2**32 - 1
"""jax.random.key takes no more than 32 bits of a seed."""
AUTO_RATE = 3e-4 * 256
"""Learning rate ``auto`` times the width of the network."""
NOT_WITH_REFERENCE_FLATTEN = ("codebook_update", "code_dim", "downsampling", "residual", "attention")
"""Fields of ModelConfig in which an imported model is always the published one."""


def _require(condition: bool, field: str, found: object, expected: str) -> None:
    require(condition, f"--{field.replace('_', '-')}", found, expected)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value <= LARGEST_FLOAT, name, value, "finite and greater than 0")


def _require_not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= LARGEST_FLOAT, name, value, "finite and 0 or greater")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: stride-2 steps down, a codebook, as many steps up."""

    image_size: tuple[int, int] = (256, 128)
    """Height and width of the images the model is given (first and second axis of a slice)."""
    hidden_channels: int = 256
    """Channels C of the blocks; the outermost convolutions have C / 2."""
    downsampling: Literal[4, 8, 16] = 4
    """Image pixels for one code, along each axis."""
    residual_blocks: int = 2
    """Residual blocks in the encoder, and as many in the decoder."""
    residual: Literal["post", "pre"] = "post"
    """Whether a residual block has its norms and activations after its convolutions or before them."""
    attention: bool = True
    """A self-attention block in encoder and decoder. Its time grows with the square of the pixels."""
    embedding_dim: int = 128
    """Width D of the encoder's output."""
    num_embeddings: int = 1024
    """Number K of codes in the codebook."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """What moves the codes: their gradient, or moving averages of the encoder's outputs."""
    code_dim: int = 0
    """Width of the codes, between learned projections from and to D; 0 for D itself, without projections."""
    latent_norm: bool = True
    """A norm on the encoder's output, before the codes are chosen."""
    reference_flatten: tyro.conf.Suppress[bool] = False
    """Cut the latents into vectors as the published PyTorch code does. Imported models need it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of the convolutions. Parameters, norms, code distances and losses stay float32."""

    def __post_init__(self):
        object.__setattr__(self, "image_size", tuple(self.image_size))
        _require(len(self.image_size) == 2, "image_size", self.image_size, "two numbers, height and width")
        _require(self.downsampling in (4, 8, 16), "downsampling", self.downsampling, "4, 8 or 16")
        _require(
            all(side > 0 and side % self.downsampling == 0 for side in self.image_size),
            "image_size",
            self.image_size,
            f"two positive multiples of {self.downsampling} (--downsampling)",
        )
        _require(
            self.hidden_channels >= 8 and self.hidden_channels % 8 == 0,
            "hidden_channels",
            self.hidden_channels,
            "a positive multiple of 8 (attention uses an eighth of them)",
        )
        _require_positive(self, "embedding_dim")
        _require_not_negative(self, "residual_blocks")
        _require(self.num_embeddings >= 2, "num_embeddings", self.num_embeddings, "2 or more")
        _require(
            0 <= self.code_dim <= self.embedding_dim,
            "code_dim",
            self.code_dim,
            f"from 1 to --embedding-dim, {self.embedding_dim}, or 0 for no projection",
        )
        if self.reference_flatten:
            for name in NOT_WITH_REFERENCE_FLATTEN:
                default = getattr(type(self), name)
                expected = f"{default!r} with reference_flatten: the published model"
                _require(getattr(self, name) == default, name, getattr(self, name), expected)

    @property
    def halvings(self) -> int:
        """How often the encoder halves an image's sides."""
        return self.downsampling.bit_length() - 1

    @property
    def codebook_dim(self) -> int:
        """Width of a code."""
        return self.code_dim or self.embedding_dim

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height h and width w of the codes of an image of ``image_size``."""
        return self.latent_size_of(self.image_size)

    def latent_size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height h and width w of the codes of an image of ``size``, whose sides are multiples of the downsampling."""
        return size[0] // self.downsampling, size[1] // self.downsampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the slices come from and how they are brought to the model's size and scale."""

    data: str | None = None
    """A zip or folder of .nii or .nii.gz files, a table of them (.csv, see inspect_data.py), or "phantom" for made-up
    hips. By default data/HipMRI_study_keras_slices_data, or the zip of that name."""
    tfds_dir: str = "data/tfds"
    """Folder for the data set built from the files (about 130 kB a 256 x 128 slice)."""
    cache_limit: float = 20.0
    """GiB of built data sets to keep in --tfds-dir; those not used for the longest time are removed."""
    slice_axis: int | None = None
    """Axis along which volumes are cut into slices; by default the header's, or the one with the odd spacing."""
    slice_direction: Literal["left-right", "front-back", "head-foot"] | None = None
    """Cut volumes along this direction of the body, whatever the order of their axes."""
    case_pattern: str | None = None
    """Regular expression: what it matches in a file's path names the patient, who is kept within one split.
    inspect_data.py shows what is found without it."""
    on_bad_file: Literal["error", "skip"] = "error"
    """Whether files that cannot be read stop the run or are listed and left out."""
    nan: Literal["refuse", "zero"] = "refuse"
    """Whether a file with voxels that are NaN counts as one that cannot be read, or they are read as 0."""
    fit: Literal["pad-crop", "resize"] = "pad-crop"
    """How slices are brought to --image-size: centred padding and cropping, or resizing."""
    scale_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of a file's intensities that become 0 and 1; what lies beyond is clipped."""
    phantom_cases: int = 48
    """Training cases of the phantom; it has a sixth as many for validation and for testing."""
    phantom_slices: int = 10
    """Slices of each phantom case."""

    def __post_init__(self):
        object.__setattr__(self, "scale_percentiles", tuple(self.scale_percentiles))
        _require(
            len(self.scale_percentiles) == 2 and 0 <= self.scale_percentiles[0] < self.scale_percentiles[1] <= 100,
            "scale_percentiles",
            self.scale_percentiles,
            "two rising numbers between 0 and 100",
        )
        if self.slice_axis is not None:
            _require(self.slice_axis in range(-3, 3), "slice_axis", self.slice_axis, "between -3 and 2")
        _require_not_negative(self, "cache_limit")
        _require_positive(self, "phantom_cases", "phantom_slices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Total = reconstruction + perceptual_weight * L1 between VGG16 features + the quantizer's loss
    + ssim_weight * (1 - SSIM)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """How pixels are compared: mean absolute difference, or mean squared difference over 0.05, scans' variance."""
    perceptual_weight: float = 0.1
    """Weight of the perceptual term; 0 builds no VGG16 at all."""
    perceptual_layers: tuple[str, ...] = ("relu3_3",)
    """VGG16 layers whose features are compared (relu1_1 to relu5_3), each with the same weight."""
    vgg_weights: str = "auto"
    """Trained VGG16: "auto" downloads torchvision's once (554 MB, 7 MB kept). Or a file: safetensors or .pth under
    torchvision's names, Keras's .h5 without its top. Or "random" for untrained filters."""
    ssim_weight: float = 0.0
    """Weight of 1 - SSIM; 0 does not compute it."""
    rate_weight: float = 0.0
    """Weight of the bits a pixel that the codes take; above 0, --from is a run with a prior, and both are trained."""

    def __post_init__(self):
        object.__setattr__(self, "perceptual_layers", tuple(self.perceptual_layers))
        _require_not_negative(self, "perceptual_weight", "ssim_weight", "rate_weight")
        _require(
            0 < len(self.perceptual_layers) == len(set(self.perceptual_layers)),
            "perceptual_layers",
            self.perceptual_layers,
            "one or more names, each once",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation: Adam, a learning rate that falls, clipped gradients."""

    from_run: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN")] = None
    """Start from this run's best weights and codebook, and with its settings, but for other flags given."""
    epochs: int = 50
    """Passes over the training slices."""
    batch_size: int = 32
    """Slices in one step, over all devices."""
    learning_rate: float | Literal["auto"] = 1e-4
    """Adam's highest learning rate; auto is 3e-4 at width 256 and as much more as --hidden-channels is less."""
    schedule: Literal["steps", "cosine"] = "steps"
    """How the learning rate falls: to a half every 20 epochs, as published, or as a cosine to 0 at the end."""
    warmup_steps: int = 0
    """Steps in which the learning rate first rises from 0."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    accumulate: int = 1
    """Parts that each batch is cut into, to take the memory of one part. Gradients are averaged over the parts;
    batch norm and an EMA codebook see each part by itself."""
    remat: Literal["auto", "none", "cheap", "full"] = "auto"
    """What the gradient computes again instead of keeping it in memory: nothing, norms and activations, or all but
    the blocks' outputs. auto takes the first that fits in memory."""
    seed: int = 0
    """The one seed of every random draw: parameters, order of the slices, augmentation, codebook."""
    sample_images: int = 4
    """Validation slices drawn into samples/ after each epoch; 0 draws none."""

    def __post_init__(self):
        _require_positive(self, "epochs", "batch_size", "accumulate")
        if self.learning_rate != "auto":
            _require_positive(self, "learning_rate")
        _require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of the batch size, {self.batch_size}",
        )
        _require_not_negative(self, "gradient_clip", "sample_images", "warmup_steps")
        _require(0 <= self.seed <= LARGEST_SEED, "seed", self.seed, f"between 0 and {LARGEST_SEED}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random changes to training images, drawn anew each time one is shown; 0 leaves a kind of change out."""

    flip: bool = False
    """Mirror half of the images along their first axis (left-right in HipMRI)."""
    rotation: float = 0.0
    """Turn by up to this many degrees, either way."""
    zoom: float = 0.0
    """Enlarge or shrink by up to this share: 0.1 is from 1 / 1.1 to 1.1."""
    shift: float = 0.0
    """Move by up to this share of each side."""
    gamma: float = 0.0
    """Raise intensities to a power between exp(-gamma) and exp(gamma)."""
    bias_field: float = 0.0
    """Multiply by a smooth field between exp(-bias_field) and exp(bias_field)."""

    def __post_init__(self):
        for name, most in {"rotation": 180, "zoom": 1, "shift": 1, "gamma": 5, "bias_field": 5}.items():
            value = getattr(self, name)
            _require(0 <= value <= most, name, value, f"from 0 to {most}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration of a run, as written to its config.json. ``Config()`` is the published network, loss
    and training at HipMRI's native size."""

    preset: Literal["hipmri", "hipmri-psnr", "reference", "demo"] = "reference"
    """The settings to start from; every other flag changes one of them."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    augmentation: AugmentationConfig = AugmentationConfig()

    @property
    def learning_rate(self) -> float:
        """Adam's highest learning rate, a number where the settings say ``auto`` too."""
        rate = self.training.learning_rate
        return AUTO_RATE / self.model.hidden_channels if rate == "auto" else rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """A prior over a run's codes, as written to config.json in the run's folder ``prior``."""

    epochs: int = 40
    """Passes over the training slices; each encodes them anew, augmented."""
    batch_size: int = 16
    """Slices in one step, over all devices."""
    learning_rate: float = 4e-3
    """Adam's highest learning rate; it falls as a cosine to 0 at the end."""
    channels: int = 64
    """Width of the network."""
    blocks: int = 4
    """Residual blocks of two 3 x 3 convolutions."""
    neighbours: int = 2
    """Slices before each that are given with it."""
    patience: int = 8
    """Stop after so many epochs without better bits on the validation split."""
    seed: int = 0
    """The one seed of every random draw."""
    model: tyro.conf.Suppress[str] = ""
    """The fingerprint of the model whose codes these are."""

    def __post_init__(self):
        _require_positive(self, "epochs", "batch_size", "learning_rate", "blocks", "neighbours", "patience")
        _require(1 <= self.channels <= 80, "channels", self.channels, "from 1 to 80 (sums must stay below 2**24)")
        _require(0 <= self.seed <= LARGEST_SEED, "seed", self.seed, f"between 0 and {LARGEST_SEED}")


PRIOR_PRESETS = {"demo": PriorConfig(epochs=8, channels=32, blocks=3, neighbours=1, learning_rate=4e-3)}
"""Where a run's preset has a prior of its own."""

_HIPMRI = Config(
    preset="hipmri",
    model=ModelConfig(codebook_update="ema", latent_norm=False, code_dim=16, residual="pre"),
    loss=LossConfig(ssim_weight=0.5),
    training=TrainingConfig(learning_rate="auto"),
)
PRESETS: dict[str, Config] = {
    "hipmri": _HIPMRI,
    "hipmri-psnr": dataclasses.replace(
        _HIPMRI, preset="hipmri-psnr", loss=LossConfig(reconstruction="l2", perceptual_weight=0)
    ),
    "reference": Config(model=ModelConfig(image_size=(256, 256)), data=DataConfig(fit="resize")),
    "demo": Config(
        preset="demo",
        model=ModelConfig(
            image_size=(128, 64),
            hidden_channels=64,
            embedding_dim=32,
            num_embeddings=256,
            codebook_update="ema",
            latent_norm=False,
            code_dim=16,
            residual="pre",
        ),
        data=DataConfig(data="phantom"),
        loss=LossConfig(perceptual_layers=("relu1_1",), vgg_weights="random", ssim_weight=0.5),
        training=TrainingConfig(epochs=8, batch_size=8, learning_rate=2e-3, schedule="cosine", warmup_steps=60),
    ),
}
"""``hipmri`` is the default; each change it makes to ``Config()`` is a row of docs/results.md. ``hipmri-psnr`` is for
those who judge by PSNR: it compares pixels alone. ``reference`` is the published recipe. ``demo`` takes minutes on a
CPU."""
