"""Every setting of a training run, in one tree of frozen dataclasses.

One dotted name per setting, e.g. ``model.fusion.layers``: the command-line override, the Optuna parameter and
the MLflow parameter are that same string (`qafe.dotted`). A preset (``paper``, ``small``, ``tiny``) is a function
that returns a `Config`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .errors import ConfigError

EXPRESSIONS = ("sit_at_rest", "smile", "frown", "squeeze_eyes", "clench_teeth")
"""PFED5's five expressions in the order of its class index (0-4)."""

Fusion = Literal["cross", "cross_split", "gated", "concat", "sum"]
Query = Literal["both", "rgb", "heatmap"]
Position = Literal["heatmap", "rgb", "both", "none"]
Mixer = Literal["conv1d", "none", "attention_pool"]
AxisOrder = Literal["corrected", "reference"]
Points = Literal["all", "eyes_brows", "mouth", "nose"]
Colour = Literal["jet", "grey"]
Loss = Literal["bmc", "gai", "focal_mse", "focal_l1", "mse", "l1", "huber"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["step", "cosine", "constant"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

ATTENTION_FUSIONS: tuple[str, ...] = ("cross", "cross_split", "gated")
"""The fusions that have layers, heads, a query direction and an MLP."""


def _require(rule: bool, message: str) -> None:
    if not rule:
        raise ConfigError(message)


def _require_above(low: float, **values: float) -> None:
    for name, value in values.items():
        _require(value > low, f"{name} must be greater than {low:g}, got {value:g}. Set a larger value.")


def _require_at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        _require(value >= low, f"{name} must be at least {low:g}, got {value:g}. Set {name}={low:g} or more.")


def _require_fraction(**values: float) -> None:
    for name, value in values.items():
        _require(0 <= value < 1, f"{name} must lie in [0, 1), got {value:g}. Set e.g. {name}=0.1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RGBEncoderConfig:
    """Former-DFER: a ResNet-18 with a spatial transformer, then a temporal transformer (arXiv:2312.00856)."""

    size_px: int = 224
    """Side of the square frames it reads; a multiple of 16."""
    width: int = 64
    """Channels after the stem; a token has 8 times as many values."""
    spatial_depth: int = 1
    spatial_heads: int = 8
    spatial_mlp: int = 512
    temporal_depth: int = 3
    temporal_heads: int = 8
    temporal_mlp: int = 1024
    weights: str = ""
    """File with pretrained weights (the Former-DFER file or one of ours); empty starts from scratch."""
    frozen: bool = False
    """Train nothing in it: its parameters and batch norm statistics stay as they are loaded."""

    def __post_init__(self) -> None:
        _require(
            self.size_px >= 32 and self.size_px % 16 == 0,
            f"the RGB frame side must be a multiple of 16, at least 32, got {self.size_px} (model.rgb.size_px). "
            "Set model.rgb.size_px=224.",
        )
        _require_above(
            0,
            **{
                "model.rgb.width": self.width,
                "model.rgb.spatial_heads": self.spatial_heads,
                "model.rgb.temporal_heads": self.temporal_heads,
                "model.rgb.spatial_mlp": self.spatial_mlp,
                "model.rgb.temporal_mlp": self.temporal_mlp,
            },
        )
        _require_at_least(
            0, **{"model.rgb.spatial_depth": self.spatial_depth, "model.rgb.temporal_depth": self.temporal_depth}
        )
        for name, dim, heads in (
            ("spatial", 4 * self.width, self.spatial_heads),
            ("temporal", 8 * self.width, self.temporal_heads),
        ):
            _require(
                dim % heads == 0,
                f"model.rgb.{name}_heads must divide {dim}, got {heads}. Set model.rgb.{name}_heads=4.",
            )

    @property
    def token_width(self) -> int:
        """Values in one RGB token."""
        return 8 * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapEncoderConfig:
    """SlowOnly: a 3-D ResNet of bottlenecks over landmark heatmaps (arXiv:2312.00856, arXiv:2104.13586)."""

    size_px: int = 56
    """Side of the square heatmap frames it reads."""
    width: int = 32
    """Channels after the stem; a token has 4 * 2**(stages - 1) times as many values."""
    blocks: tuple[int, ...] = (4, 6, 3)
    """Bottlenecks in each stage; the first stage has no temporal convolution."""
    weights: str = ""
    """File with pretrained weights (the pose file or one of ours); empty starts from scratch."""
    stem_adaptation: Literal["random", "mean", "sum"] = "random"
    """What the 17-channel stem of the pose file becomes: left random as published, or its mean or sum."""
    frozen: bool = False
    """Train nothing in it: its parameters and batch norm statistics stay as they are loaded."""

    def __post_init__(self) -> None:
        _require_at_least(8, **{"model.heatmap.size_px": self.size_px})
        _require_above(0, **{"model.heatmap.width": self.width})
        _require(
            len(self.blocks) >= 1 and all(count >= 1 for count in self.blocks),
            f"every stage needs at least one block, got {self.blocks} (model.heatmap.blocks). Set [4,6,3].",
        )

    @property
    def token_width(self) -> int:
        """Values in one heatmap token."""
        return 4 * self.width << (len(self.blocks) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionConfig:
    """How the tokens of the two streams meet."""

    kind: Fusion = "cross"
    """cross: one set of weights for both directions, as published; cross_split: separate weights for each
    direction; gated: cross with a learned gate on what is read; concat, sum: no attention."""
    width: int = 512
    """Width of a token inside the fusion; streams of another width are projected."""
    layers: int = 3
    heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    drop_path: float = 0.0
    query: Query = "both"
    """Which stream reads the other; a stream that does not read keeps its tokens."""
    position: Position = "heatmap"
    """Which stream gets the learned positional embedding (published: heatmap)."""
    mixer: Mixer = "conv1d"
    """What mixes the tokens before the head: Conv1d over tokens (published), nothing, or attention pooling."""

    def __post_init__(self) -> None:
        _require_above(
            0,
            **{
                "model.fusion.width": self.width,
                "model.fusion.layers": self.layers,
                "model.fusion.heads": self.heads,
                "model.fusion.mlp_ratio": self.mlp_ratio,
            },
        )
        _require_fraction(**{"model.fusion.dropout": self.dropout, "model.fusion.drop_path": self.drop_path})
        _require(
            self.kind not in ATTENTION_FUSIONS or self.width % self.heads == 0,
            f"model.fusion.heads must divide model.fusion.width={self.width}, got {self.heads}. "
            "Set model.fusion.heads=8.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """QAFE-Net: two encoders, the fusion, the head."""

    segments: int = 5
    """Segments in a clip; a clip has segments * segment_frames frames."""
    segment_frames: int = 16
    """Frames in a segment."""
    rgb_axis_order: AxisOrder = "corrected"
    """corrected: the encoder sees whole frames; reference: the published code's [C,T,H,W] read as [T,C,H,W],
    which its trained weights need."""
    rgb: RGBEncoderConfig = field(default_factory=RGBEncoderConfig)
    heatmap: HeatmapEncoderConfig = field(default_factory=HeatmapEncoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    head_widths: tuple[int, ...] = (256, 128)
    """Hidden widths of the MLP that turns a token into a score."""

    def __post_init__(self) -> None:
        _require_above(0, **{"model.segments": self.segments, "model.segment_frames": self.segment_frames})
        _require(
            all(width >= 1 for width in self.head_widths),
            f"every hidden layer needs at least one value, got {self.head_widths} (model.head_widths). Set [256,128].",
        )

    @property
    def clip_frames(self) -> int:
        """Frames in a clip."""
        return self.segments * self.segment_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapConfig:
    """How landmarks become heatmap frames (published: 256 px, sigma 1, window 5, blur 7, jet)."""

    canvas_px: int = 256
    """Side of the square that points are drawn on, before it is resized for the encoder."""
    sigma_px: float = 1.0
    """Standard deviation of a point's Gaussian, in canvas pixels."""
    window_px: int = 5
    """A point is drawn within this many canvas pixels of itself."""
    blur_px: int = 7
    """Side of the Gaussian kernel that the sum is blurred with, odd; 0 does not blur."""
    points: Points = "all"
    """Which landmarks are drawn: the 73 inner ones, or a group of them."""
    colour: Colour = "jet"
    """jet: three channels through OpenCV's colour map, as published; grey: one channel."""
    skip_first: bool = False
    """Leave the first of the 73 points out, as the published code does."""

    def __post_init__(self) -> None:
        _require_above(0, **{"data.heatmap.canvas_px": self.canvas_px, "data.heatmap.sigma_px": self.sigma_px})
        _require_at_least(1, **{"data.heatmap.window_px": self.window_px})
        _require(
            self.blur_px in (0, 1, 3, 5, 7, 9, 11, 13, 15),
            f"data.heatmap.blur_px must be 0 or odd and at most 15, got {self.blur_px}. Set data.heatmap.blur_px=7.",
        )
        _require(
            self.canvas_px > self.blur_px,
            f"data.heatmap.canvas_px must be greater than data.heatmap.blur_px={self.blur_px}, got {self.canvas_px}. "
            "Set data.heatmap.canvas_px=256.",
        )

    @property
    def channels(self) -> int:
        """Channels of a heatmap frame."""
        return 3 if self.colour == "jet" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes to training clips, one draw a clip."""

    flip: float = 0.5
    """Probability of a left-right flip."""
    crop: float = 0.875
    """Side of the crop as a share of the resized frame (published: 224 of 256 and 56 of 64)."""
    joint: bool = True
    """One draw for both streams. False: a draw for each, as published, which mirrors the streams against each
    other in half of the clips."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.flip <= 1,
            f"data.augment.flip must lie in [0, 1], got {self.flip:g}. Set data.augment.flip=0.5.",
        )
        _require(
            0.5 <= self.crop <= 1,
            f"data.augment.crop must lie in [0.5, 1], got {self.crop:g}. Set data.augment.crop=0.875.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which clips are drawn from a prepared dataset, and how."""

    repeats: int = 5
    """Clips drawn from each training video in an epoch (published: 5)."""
    validation_fraction: float = 0.25
    """Share of the training patients held out for validation; whole patients, never single videos."""
    split_seed: int = 0
    """Seed of the validation split, apart from the training seed so that seeds can be compared."""
    shuffle_labels: bool = False
    """Give every clip another clip's score: what a study reports when there is nothing to learn."""
    cache_gb: float = 64.0
    """Most GiB of decoded frames that are kept on this machine's disk (``~/.cache/qafe/frames``) for all its processes
    and runs together; 0 decodes the JPEGs each time. Changes no number."""
    workers: int = 4
    """Processes that read clips beside the training process; 0 reads in it."""
    heatmap: HeatmapConfig = field(default_factory=HeatmapConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _require_above(0, **{"data.repeats": self.repeats})
        _require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction must lie between 0 and 1, got {self.validation_fraction:g}. "
            "Set data.validation_fraction=0.25.",
        )
        _require_at_least(
            0,
            **{
                "data.split_seed": self.split_seed,
                "data.cache_gb": self.cache_gb,
                "data.workers": self.workers,
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained (published: SGD 1e-3, step 40 x 0.1, 100 epochs, batch 4, BMC)."""

    epochs: int = 100
    batch_size: int = 4
    """Clips that go through the model at once, and that share the statistics of its batch norms; under torchrun the
    clips of all processes together, each of which takes its share."""
    accumulate: int = 1
    """Batches that make one step, as if they were one: memory is that of a single batch. A loss that compares the
    clips of a batch (bmc) sees them all, for which each batch goes through the model twice."""
    checkpoint: bool = False
    """Compute the RGB encoder's activations again for the gradient instead of keeping them: less memory, the same
    numbers, a third more time."""
    compile: bool = False
    """Train through torch.compile: minutes at the start, faster steps on a GPU; needs a C++ compiler."""
    sync_batchnorm: bool = True
    """Under torchrun, take the statistics of batch norms over the clips of all processes: the numbers are those of one
    process, for two small exchanges a norm and pass. False: each process has its own, over few clips, and the model
    keeps those of the first, as in the authors' DataParallel. Changes nothing in one process."""
    optimizer: Optimizer = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    """SGD's momentum; AdamW's beta1."""
    weight_decay: float = 1e-4
    schedule: Schedule = "step"
    step_epochs: int = 40
    """Epochs between two steps of schedule=step."""
    step_factor: float = 0.1
    warmup_epochs: int = 0
    """Epochs of linear warm-up from zero, before any schedule."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU that has it, fp16 with scaling on others; on a CPU bf16 if it has AMX, else fp32. The loss is
    always fp32."""
    loss: Loss = "bmc"
    noise_sigma: float = 1.0
    """Standard deviation of the label noise that bmc and gai assume."""
    train_noise_sigma: bool = False
    """Train noise_sigma with the model."""
    huber_delta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_above(
            0,
            **{
                "train.epochs": self.epochs,
                "train.batch_size": self.batch_size,
                "train.accumulate": self.accumulate,
                "train.lr": self.lr,
                "train.step_epochs": self.step_epochs,
                "train.step_factor": self.step_factor,
                "train.noise_sigma": self.noise_sigma,
                "train.huber_delta": self.huber_delta,
            },
        )
        _require_at_least(
            0,
            **{
                "train.weight_decay": self.weight_decay,
                "train.warmup_epochs": self.warmup_epochs,
                "train.clip_norm": self.clip_norm,
                "train.seed": self.seed,
            },
        )
        _require_fraction(**{"train.momentum": self.momentum})
        _require(
            self.loss != "bmc" or self.batch_size * self.accumulate >= 2,
            "batch_size must be at least 2 for loss='bmc' (one sample always gives zero loss), "
            f"got {self.batch_size} (train.batch_size). Set train.batch_size=4, train.accumulate=4 or train.loss=mse.",
        )
        _require(
            not (self.compile and self.checkpoint),
            "train.compile decides itself what is computed again and goes without train.checkpoint, got both true. "
            "Set one of them to false.",
        )
        _require(
            not self.train_noise_sigma or self.loss in ("bmc", "gai"),
            f"train.train_noise_sigma needs a loss that has a noise sigma (bmc, gai), got {self.loss}. "
            "Set train.loss=bmc.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that decides what a training run computes, apart from the data itself."""

    preset: str = "paper"
    """Name of the preset that the run started from; a label."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def paper() -> Config:
    """The published QAFE-Net: 29.7 M parameters, 80 frames, 224 px and 56 px, SGD and BMC."""
    return Config()


def small() -> Config:
    """Half the width, 40 frames at 112 px; for one modest GPU or a patient CPU."""
    return Config(
        preset="small",
        model=ModelConfig(
            segments=5,
            segment_frames=8,
            rgb=RGBEncoderConfig(size_px=112, width=32, temporal_depth=2, spatial_mlp=256, temporal_mlp=512),
            heatmap=HeatmapEncoderConfig(size_px=56, width=16, blocks=(2, 3, 2)),
            fusion=FusionConfig(width=256, layers=2),
            head_widths=(128, 64),
        ),
        data=DataConfig(repeats=2, workers=0, heatmap=HeatmapConfig(canvas_px=64, window_px=3, blur_px=0)),
        train=TrainConfig(epochs=40, batch_size=8, optimizer="adamw", lr=5e-4, schedule="cosine"),
    )


def tiny() -> Config:
    """20 frames; trains in seconds on two cores; for a first look, tests and laptops. Its layers are too narrow to gain
    from bf16."""
    return Config(
        preset="tiny",
        model=ModelConfig(
            segments=5,
            segment_frames=4,
            rgb=RGBEncoderConfig(
                size_px=32,
                width=4,
                spatial_heads=2,
                temporal_depth=1,
                temporal_heads=2,
                spatial_mlp=32,
                temporal_mlp=64,
            ),
            heatmap=HeatmapEncoderConfig(size_px=16, width=4, blocks=(1, 1, 1)),
            fusion=FusionConfig(width=64, layers=1, heads=4),
            head_widths=(32, 16),
        ),
        data=DataConfig(
            repeats=1, workers=0, heatmap=HeatmapConfig(canvas_px=32, window_px=3, blur_px=0, colour="grey")
        ),
        train=TrainConfig(
            epochs=10,
            batch_size=4,
            optimizer="adamw",
            lr=4e-3,
            weight_decay=0.05,
            schedule="cosine",
            warmup_epochs=1,
            precision="fp32",
            loss="mse",
        ),
    )


PRETRAINED = ("model.rgb.weights", "model.heatmap.weights")
"""The settings that name files on this machine."""
PRESETS: dict[str, Callable[[], Config]] = {"paper": paper, "small": small, "tiny": tiny}
