"""What a run is made of: frozen dataclasses, the presets, and config.json in and out.

Every field is also a flag of scripts/train.py under the same name (``hidden_channels`` is
``--hidden-channels``); the text below a field is that flag's help.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from vqvae_jax.errors import ConfigError

LARGEST_FLOAT = sys.float_info.max
LARGEST_SEED = 2**32 - 1
"""jax.random.key takes no more than 32 bits of a seed."""
MOST_CODES = 2**24
"""Counts of codes are float32, which holds every whole number up to this."""
CODEBOOK_OPTIONS = (
    *("codebook_update", "codebook_init", "revive_below"),
    *("cosine_codes", "code_dim", "entropy_weight", "gradient_estimator"),
)
"""Fields of ModelConfig that change how a codebook is learned."""
ARCHITECTURE_OPTIONS = ("norm", "downsampling", "levels", "residual", "attention", "upsampling")
"""Fields of ModelConfig that make another network than the published one."""


def _require(condition: bool, flag: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"--{flag.replace('_', '-')} is {value!r}, but must be {expected}")


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
    """Channels C of the residual and attention blocks; the outermost convolutions have C/2."""
    downsampling: Literal[4, 8, 16] = 4
    """Image pixels for one code, along each axis: a stride-2 step down and one up for each doubling. From 4 to 8
    there are a quarter as many codes."""
    levels: Literal[1, 2] = 1
    """Levels of codes, each with a quantizer of its own. With 2 (VQ-VAE-2), a top level of a quarter as many codes
    stands for squares of twice --downsampling, and the bottom level adds to it."""
    residual_blocks: int = 2
    """Residual blocks in the encoder, and as many in the decoder (with --levels 2 also on the way to the top level
    and back)."""
    residual: Literal["post", "pre"] = "post"
    """Where a residual block has its norms and activations: after its convolutions and the sum, or before its
    convolutions, so that the sum passes from block to block unchanged (a norm and activation follow the last)."""
    attention: bool = True
    """A self-attention block in encoder and decoder, in which every position sees all others; its time grows with
    the square of the pixels."""
    upsampling: Literal["transposed", "nearest"] = "transposed"
    """How the decoder doubles the sides: by a transposed convolution, or by repeating each pixel and a convolution,
    which leaves no checkerboard."""
    embedding_dim: int = 128
    """Width D of a code."""
    quantizer: Literal["vq", "fsq"] = "vq"
    """A learned codebook (vq), or finite scalar quantization (fsq), which rounds and has none: of the settings
    of codes it takes --fsq-levels alone."""
    num_embeddings: int = 1024
    """Number K of codes in the codebook."""
    commitment_cost: float = 0.25
    """Weight of the term that pulls the encoder's output towards its code."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """What moves the codes: their gradient, or moving averages of the encoder's outputs."""
    codebook_init: Literal["kmeans", "random"] = "kmeans"
    """How codes start with --codebook-update ema: by k-means on the first batch's latents, or at random."""
    ema_decay: float = 0.97
    """Share of the old averages kept at each step, with --codebook-update ema."""
    revive_below: float = 0.03
    """With --codebook-update ema, a code used less than this share of the codes' average use takes a random latent
    of the batch; 0 leaves unused codes be."""
    cosine_codes: bool = False
    """Bring latents and codes to length 1, so that the code at the smallest angle is chosen."""
    code_dim: int = 0
    """Width of the codes themselves, between learned projections from and to --embedding-dim (8 to 32 keep more
    codes in use); 0 for no projection."""
    entropy_weight: float = 0.0
    """Weight of the entropy term: each latent sure of its code, all codes used alike; 0 leaves it out."""
    entropy_temperature: float = 1.0
    """Temperature of the entropy term: about the squared distance between neighbouring codes (for codes of
    length 1 far below 1, such as 0.01)."""
    gradient_estimator: Literal["straight-through", "rotation"] = "straight-through"
    """How the gradient passes from a code to its latent: unchanged, or turned as code turns into latent (the
    rotation trick)."""
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    """Levels of each number of a code, with --quantizer fsq; their product is the number of codes."""
    norm: Literal["batch", "group"] = "batch"
    """What layers are normalised over: the whole batch, with running statistics to use the model; or each image by
    itself, over groups of its channels, which does not depend on the batch size."""
    latent_norm: bool = True
    """A norm on the encoder's output, before the codes are chosen."""
    published_flatten: bool = False
    """Cut the latents into vectors as the published PyTorch code does: for models imported from it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type the convolutions compute in; parameters, norms, code distances and losses stay float32."""

    def __post_init__(self):
        object.__setattr__(self, "image_size", tuple(self.image_size))
        _require(len(self.image_size) == 2, "image_size", self.image_size, "two numbers, height and width")
        _require(self.downsampling in (4, 8, 16), "downsampling", self.downsampling, "4, 8 or 16")
        _require(self.levels in (1, 2), "levels", self.levels, "1 or 2")
        halvings = self.halvings + self.levels - 1
        _require(
            all(side > 0 and side % 2**halvings == 0 for side in self.image_size),
            "image_size",
            self.image_size,
            f"two positive multiples of {2**halvings} (the model halves each side {halvings} times)",
        )
        _require(
            self.hidden_channels >= 8 and self.hidden_channels % 8 == 0,
            "hidden_channels",
            self.hidden_channels,
            "a positive multiple of 8 (attention uses an eighth of them)",
        )
        _require_positive(self, "embedding_dim")
        _require_not_negative(self, "residual_blocks", "commitment_cost")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "from 0 to below 1")
        _require(0 <= self.revive_below < 1, "revive_below", self.revive_below, "from 0 to below 1")
        _require(self.num_embeddings >= 2, "num_embeddings", self.num_embeddings, "2 or more")
        self._check_quantizer()

    @property
    def halvings(self) -> int:
        """How often the encoder halves an image's sides, down to the finest codes."""
        return self.downsampling.bit_length() - 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height h and width w of an image's finest codes."""
        return self.latent_sizes[0]

    @property
    def latent_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of an image's codes at each level, the finest first."""
        height, width = self.image_size
        squares = [self.downsampling * 2**level for level in range(self.levels)]
        return tuple((height // square, width // square) for square in squares)

    @property
    def num_codes(self) -> int:
        """Number K of codes, of whichever quantizer, at each level."""
        return math.prod(self.fsq_levels) if self.quantizer == "fsq" else self.num_embeddings

    def _check_quantizer(self) -> None:
        object.__setattr__(self, "fsq_levels", tuple(self.fsq_levels))
        _require(
            len(self.fsq_levels) > 0
            and all(levels >= 2 for levels in self.fsq_levels)
            and math.prod(self.fsq_levels) <= MOST_CODES,
            "fsq_levels",
            self.fsq_levels,
            f"numbers of 2 or more whose product is at most {MOST_CODES}",
        )
        _require(
            0 <= self.code_dim <= self.embedding_dim,
            "code_dim",
            self.code_dim,
            f"from 1 to the embedding's width, {self.embedding_dim}, or 0 for no projection",
        )
        _require_not_negative(self, "entropy_weight")
        _require_positive(self, "entropy_temperature")
        width = self.code_dim or self.embedding_dim
        _require(width > 1 or not self.cosine_codes, "cosine_codes", True, "off for codes of width 1: all are 1 or -1")
        if self.quantizer == "fsq":
            self._require_defaults(CODEBOOK_OPTIONS, "with --quantizer fsq, which has no codebook: give both")
        if self.published_flatten:
            options = ("quantizer", *CODEBOOK_OPTIONS, *ARCHITECTURE_OPTIONS)
            self._require_defaults(options, "with --published-flatten: the published model")

    def _require_defaults(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            default = getattr(type(self), name)
            _require(getattr(self, name) == default, name, getattr(self, name), f"{default!r} {why}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the slices come from and how they are brought to the model's size and scale."""

    data: str | None = None
    """The HipMRI zip, its extracted folder, any folder of .nii/.nii.gz files, or "phantom" for made-up hips.
    Without it: data/HipMRI_study_keras_slices_data, or the zip of that name beside it."""
    tfds_dir: str = "data/tfds"
    """Folder for the data set built from the files (about 130 kB a 256 x 128 slice)."""
    slice_axis: int = -1
    """Axis along which a volume is cut into slices; -1 is the last."""
    case_pattern: str | None = None
    """Regular expression found in a file's path below --data; what it matches names the patient, who is
    kept within one split. By default: case_<id> of HipMRI names, BIDS's sub-<label>, else the first folder with a
    number in its name, else the file name up to its first number."""
    on_bad_file: Literal["error", "skip"] = "error"
    """Whether files that cannot be read stop the run or are listed and left out."""
    fit: Literal["pad-crop", "resize"] = "pad-crop"
    """How slices of another size are brought to --image-size: centred padding and cropping, or resizing."""
    scale_percentiles: tuple[float, float] = (0.5, 99.5)
    """Percentiles of a file's intensities that become 0 and 1; what lies beyond is clipped."""
    memory_limit_gib: float = 4.0
    """Prepared slices are kept in memory where all of them take no more than this."""
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
        _require(self.slice_axis in range(-3, 3), "slice_axis", self.slice_axis, "between -3 and 2")
        _require_not_negative(self, "memory_limit_gib")
        _require_positive(self, "phantom_cases", "phantom_slices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Total = reconstruction + perceptual_weight * L1 between VGG16 features + the quantizer's loss
    + ssim_weight * (1 - SSIM) + ms_ssim_weight * (1 - MS-SSIM) + adversarial_weight * the adaptive weight * the
    discriminator's verdict."""

    reconstruction: Literal["l1", "l2", "charbonnier"] = "l1"
    """How pixels are compared: mean absolute difference, mean squared difference, or a smooth absolute value."""
    perceptual_weight: float = 0.1
    """Weight of the perceptual term; 0 builds no VGG16 at all."""
    perceptual_layers: tuple[str, ...] = ("relu3_3",)
    """VGG16 layers whose features are compared (relu1_1 to relu5_3), each with the same weight."""
    vgg_weights: str = "auto"
    """Trained VGG16: "auto" for torchvision's (554 MB downloaded once, 7 MB kept), or a file: safetensors under
    torchvision's names, torchvision's .pth, Keras's .h5 without its top. Or "random" for untrained filters."""

    ssim_weight: float = 0.0
    """Weight of 1 - SSIM; 0 does not compute it."""
    ms_ssim_weight: float = 0.0
    """Weight of 1 - MS-SSIM, over as many of its five scales as the images have room for; 0 does not compute it."""
    adversarial_weight: float = 0.0
    """Weight of a patch discriminator's verdict on reconstructions, as in VQGAN, meant to sharpen; detail may be
    invented. It multiplies an adaptive weight, the ratio of the norms of the two gradients (of the terms that compare
    images, and of the verdict) at the decoder's last layer. 0 builds no discriminator at all."""
    adversarial_start: int = 0
    """Steps before the discriminator joins: until then it does not learn, and its verdict does not count."""
    discriminator_channels: int = 64
    """Channels of the discriminator's first layer; each next one has twice as many, up to eight times."""
    discriminator_layers: int = 3
    """Stride-2 layers of the discriminator: 3 judge patches of 70 x 70 pixels, 2 of 34 x 34."""

    def __post_init__(self):
        object.__setattr__(self, "perceptual_layers", tuple(self.perceptual_layers))
        weights = ("perceptual_weight", "ssim_weight", "ms_ssim_weight", "adversarial_weight")
        _require_not_negative(self, *weights, "adversarial_start")
        _require_positive(self, "discriminator_channels", "discriminator_layers")
        _require(
            0 < len(self.perceptual_layers) == len(set(self.perceptual_layers)),
            "perceptual_layers",
            self.perceptual_layers,
            "one or more names, each once",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation: Adam, a learning rate that falls, clipped gradients."""

    epochs: int = 50
    """Passes over the training slices."""
    batch_size: int = 32
    """Slices in one step, over all devices."""
    learning_rate: float = 1e-4
    """Adam's highest learning rate."""
    schedule: Literal["steps", "cosine"] = "steps"
    """How the learning rate falls: by --learning-rate-decay every --decay-epochs, or as a cosine to 0 at the end."""
    warmup_steps: int = 0
    """Steps in which the learning rate first rises from 0."""
    learning_rate_decay: float = 0.5
    """Factor on the learning rate after every --decay-epochs epochs."""
    decay_epochs: int = 20
    """Epochs between two reductions of the learning rate, after the warm-up."""
    weight_decay: float = 0.0
    """Share of each kernel taken off at each step, times the learning rate (AdamW)."""
    average_decay: float = 0.0
    """Share of the old kept at each step in a moving average of the weights, which is what is evaluated and used;
    0 uses the weights themselves."""
    early_stopping: int = 0
    """Stop after so many epochs without a better validation SSIM; 0 never does."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    accumulate: int = 1
    """Parts that each batch is cut into, one after another; their gradients are averaged before the parameters
    move. Takes the memory of one part. Batch norm and an EMA codebook see each part by itself, and move with each."""
    remat: Literal["none", "cheap", "full"] = "cheap"
    """What the gradient computes again instead of keeping it in memory: nothing; what is cheap (norms and
    activations); or all but the blocks' outputs (about a third slower, for what would not fit otherwise)."""
    seed: int = 0
    """The one seed: initial parameters, order of the slices, latents drawn for the codebook."""
    sample_images: int = 4
    """Validation slices drawn into samples/ after each epoch; 0 draws none."""

    def __post_init__(self):
        _require_positive(
            self, "epochs", "batch_size", "learning_rate", "learning_rate_decay", "decay_epochs", "accumulate"
        )
        _require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of the batch size, {self.batch_size}",
        )
        _require_not_negative(self, "gradient_clip", "sample_images", "warmup_steps", "weight_decay", "early_stopping")
        _require(0 <= self.average_decay < 1, "average_decay", self.average_decay, "from 0 to below 1")
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
    """The whole configuration of a run, as written to its config.json."""

    preset: Literal["hipmri", "reference", "demo"] = "reference"
    """The settings to start from; every other flag changes one of them. (``Config()`` itself is PUBLISHED: the
    reference recipe at 256 x 128.)"""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    augmentation: AugmentationConfig = AugmentationConfig()


PUBLISHED = Config()
"""The published network, loss and training at HipMRI's native size: what the classes above have for defaults."""

PRESETS: dict[str, Config] = {
    "hipmri": Config(
        preset="hipmri",
        model=ModelConfig(codebook_update="ema", latent_norm=False, code_dim=16, residual="pre"),
        loss=LossConfig(ssim_weight=0.5),
        training=TrainingConfig(learning_rate=3e-4),
    ),
    "reference": dataclasses.replace(
        PUBLISHED, model=ModelConfig(image_size=(256, 256)), data=DataConfig(fit="resize")
    ),
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
"""``hipmri`` is the default, and each change it makes to PUBLISHED a row of docs/results.md; ``reference`` is the
published recipe; ``demo`` runs in minutes on a CPU."""


def to_json(config: Config) -> str:
    """The configuration as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, source: str | Path = "config.json") -> Config:
    """The configuration in ``text``, as ``to_json`` writes it.

    A setting that it lacks, such as one that came after the file, has its default. A new setting's default must
    therefore be what the code did before.

    Raises:
      ConfigError: not JSON, an unknown setting, a missing group of them, or a value of the wrong type or range;
        the message names ``source`` and the setting.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid JSON ({error}); restore the file or train anew") from error
    return _from_dict(Config, values, source, "")


def _from_dict(cls: type, values: Any, source: str | Path, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: {where or 'the top level'} must be an object, found {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    groups = {name for name, field in fields.items() if dataclasses.is_dataclass(field.type)}
    if odd := sorted(values.keys() - fields.keys()) or sorted(groups - values.keys()):
        state = "unknown" if odd[0] in values else "missing"
        raise ConfigError(
            f"{source}: {state} field {where}{odd[0]}; the file belongs to another version of vqvae_jax "
            "or was edited by hand"
        )
    arguments = dict(values)
    for name, value in values.items():
        if name in groups:
            arguments[name] = _from_dict(fields[name].type, value, source, f"{where}{name}.")
        else:
            _check_type(fields[name], value, source, where)
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_type(field: dataclasses.Field, value: Any, source: str | Path, where: str) -> None:
    accepted = {
        bool: lambda v: type(v) is bool,
        int: lambda v: type(v) is int,
        float: lambda v: type(v) in (int, float),
        str: lambda v: isinstance(v, str),
        str | None: lambda v: v is None or isinstance(v, str),
        tuple[int, int]: lambda v: isinstance(v, list) and all(type(x) is int for x in v),
        tuple[int, ...]: lambda v: isinstance(v, list) and all(type(x) is int for x in v),
        tuple[str, ...]: lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
        tuple[float, float]: lambda v: isinstance(v, list) and all(type(x) in (int, float) for x in v),
    }
    choices = [(type(choice), choice) for choice in get_args(field.type)]
    check = accepted.get(field.type, lambda v: (type(v), v) in choices)  # 4.0 and True are no integers
    if not check(value):
        expected = field.type.__name__ if isinstance(field.type, type) else field.type
        raise ConfigError(f"{source}: {where}{field.name} is {value!r}, but must be of type {expected}")


CHANGEABLE = {
    "data": {"data", "tfds_dir", "memory_limit_gib"},
    "loss": {"vgg_weights"},
    "training": {"epochs", "sample_images", "remat", "early_stopping"},
}
"""Fields that a resumed run may change (``epochs`` not with a cosine, which ends with them); the others would make
it another run."""


def check_resumable(old: Config, new: Config) -> None:
    """Raises ConfigError where a resumed run's configuration differs in more than CHANGEABLE."""
    if old.preset != new.preset:
        raise ConfigError(f"--preset {new.preset} with --resume, but the run was started with {old.preset}")
    for group in ("model", "data", "loss", "training", "augmentation"):
        before, after = (dataclasses.asdict(getattr(config, group)) for config in (old, new))
        fixed = {"epochs"} if old.training.schedule == "cosine" else set()
        for name, value in before.items():
            if value != after[name] and name not in CHANGEABLE.get(group, set()) - fixed:
                flag = name.replace("_", "-")
                raise ConfigError(
                    f"--{flag} {after[name]!r} with --resume, but the run was started with {value!r}; "
                    "leave the flag out, or start another run"
                )
