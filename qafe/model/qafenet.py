"""QAFE-Net: a clip of RGB frames and its landmark heatmaps -> one severity score."""

from collections.abc import Iterator

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..config import Config, ModelConfig
from ..errors import ConfigError
from .fusion import FUSIONS
from .head import Head
from .heatmap3d import SlowOnly
from .spatial import SpatialFormer
from .temporal import TemporalFormer


class QAFENet(nn.Module):
    """Two encoders, a fusion of their tokens, and a head whose mean over tokens is the score.

    Source: arXiv:2312.00856, section 3; with the paper's settings and ``rgb_axis_order='reference'`` it computes
    what the published code computes. Differs: sizes, depths, number of segments and the fusion are free, and by
    default the RGB encoder sees whole frames.
    Shapes: B clips, C heatmap channels, T = S * F frames (S segments of F = config.segment_frames), H = W =
    config.rgb.size_px, h = w = config.heatmap.size_px, R and D widths of RGB and heatmap tokens.

    Args:
        config: all settings of the model.
        heatmap_channels: C; 3 for coloured heatmaps, 1 for grey ones.
    """

    def __init__(self, config: ModelConfig, *, heatmap_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.heatmap_channels = heatmap_channels
        self.spatial = SpatialFormer(config.rgb)
        self.temporal = TemporalFormer(config.rgb, frames=config.segment_frames)
        self.heatmap = SlowOnly(config.heatmap, in_channels=heatmap_channels)
        self.fusion = FUSIONS[config.fusion.kind](
            config.fusion,
            rgb_width=config.rgb.token_width,
            heatmap_width=config.heatmap.token_width,
            segments=config.segments,
        )
        self.head = Head(width=config.fusion.width, hidden=config.head_widths)
        for encoder in self._frozen():
            encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "QAFENet":
        """Training mode for all but the frozen encoders, which stay as in evaluation."""
        super().train(mode)
        for encoder in self._frozen():
            encoder.eval()
        return self

    def _frozen(self) -> Iterator[nn.Module]:
        if self.config.rgb.frozen:
            yield from (self.spatial, self.temporal)
        if self.config.heatmap.frozen:
            yield self.heatmap

    def forward(self, rgb: Float[Tensor, "B 3 T H W"], heatmap: Float[Tensor, "B C T h w"]) -> Float[Tensor, " B"]:
        """The score of each clip, without bound.

        Args:
            rgb: frames with ImageNet's mean and standard deviation taken out.
            heatmap: heatmap frames in [0, 1].
        Raises:
            ConfigError: a number of frames, side or channels that this model does not take.
        """
        self._check(rgb, heatmap)
        return self.score(self.encode_rgb(rgb), self.encode_heatmap(heatmap))

    def encode_rgb(self, rgb: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B S R"]:
        """One RGB token a segment."""
        frames = self.config.segment_frames
        # Rows are segment-major, as in the published code: row = segment * B + clip.
        x = rearrange(rgb, "b c (s f) h w -> (s b) c f h w", f=frames)
        if self.config.rgb_axis_order == "corrected":
            x = rearrange(x, "n c f h w -> (n f) c h w")
        else:
            # The published code reads [3, F] as [F, 3]: each "frame" is three frames of one colour.
            x = rearrange(x, "n c f h w -> n (c f) h w")
            x = rearrange(x, "n (f c) h w -> (n f) c h w", c=3)
        x = self.spatial(x)  # (S B F) R
        x = self.temporal(rearrange(x, "(n f) r -> n f r", f=frames))  # (S B) R
        tokens: Tensor = rearrange(x, "(s b) r -> b s r", b=len(rgb))
        return tokens

    def encode_heatmap(self, heatmap: Float[Tensor, "B C T h w"]) -> Float[Tensor, "B S D"]:
        """One heatmap token a segment."""
        x = rearrange(heatmap, "b c (s f) h w -> (s b) c f h w", f=self.config.segment_frames)
        x = self.heatmap(x)  # (S B) D
        tokens: Tensor = rearrange(x, "(s b) d -> b s d", b=len(heatmap))
        return tokens

    def score(self, rgb: Float[Tensor, "B S R"], heatmap: Float[Tensor, "B S D"]) -> Float[Tensor, " B"]:
        """The score of each clip from its tokens; what is left to train over frozen encoders."""
        tokens = self.fusion(rgb, heatmap)  # B N width
        scores = self.head(tokens)  # B N 1
        mean: Tensor = scores.mean(dim=(1, 2))
        return mean

    def _check(self, rgb: Float[Tensor, "B 3 T H W"], heatmap: Float[Tensor, "B2 C T2 h w"]) -> None:
        """Clips that fit, or a ConfigError before any work is done."""
        config, frames = self.config, rgb.shape[2]
        if frames == 0 or frames % config.segment_frames:
            raise ConfigError(
                f"a clip must be whole segments of {config.segment_frames} frames (model.segment_frames), got "
                f"{frames} frames. Give {config.clip_frames} frames."
            )
        if heatmap.shape[2] != frames or len(heatmap) != len(rgb):
            raise ConfigError(
                f"both streams must have the same clips and frames, got {len(rgb)} x {frames} RGB and "
                f"{len(heatmap)} x {heatmap.shape[2]} heatmap frames. Cut both from the same frames."
            )
        for name, given, side in (
            ("rgb", tuple(rgb.shape[-2:]), config.rgb.size_px),
            ("heatmap", tuple(heatmap.shape[-2:]), config.heatmap.size_px),
        ):
            if given != (side, side):
                raise ConfigError(
                    f"{name} frames must be {side} x {side} px (model.{name}.size_px), got {given[0]} x "
                    f"{given[1]}. Resize them, or set model.{name}.size_px={given[0]}."
                )
        if heatmap.shape[1] != self.heatmap_channels:
            raise ConfigError(
                f"heatmaps must have {self.heatmap_channels} channel(s) (data.heatmap.colour), got "
                f"{heatmap.shape[1]}. Set data.heatmap.colour={'grey' if heatmap.shape[1] == 1 else 'jet'}."
            )


def build(config: Config) -> QAFENet:
    """A new model for a config, with random weights."""
    return QAFENet(config.model, heatmap_channels=config.data.heatmap.channels)
