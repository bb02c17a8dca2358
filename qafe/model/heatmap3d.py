"""SlowOnly: the heatmap frames of one segment -> one heatmap token."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..config import HeatmapEncoderConfig
from .batchnorm import BatchNorm2d
from .convolution import convolve_pixels
from .transformer import init_conv

EXPANSION = 4
"""A bottleneck's output has this many times its inner channels (arXiv:1512.03385)."""


class ConvNorm(nn.Module):
    """A 3-D convolution and its batch norm; kernel and stride are (time, space).

    No kernel here has extent in time and in space, so that frames, in ``channels_last``, go through 2-D operations:
    nothing is laid out anew between them.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel: tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        time, space = kernel
        assert time == 1 or space == 1
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            (time, space, space),
            stride=(1, stride, stride),
            padding=(time // 2, space // 2, space // 2),
            bias=False,
        )
        self.bn = BatchNorm2d(out_channels)

    def forward(self, x: Float[Tensor, "NT C H W"], frames: int) -> Float[Tensor, "NT C2 H2 W2"]:
        """Convolution, then norm.

        Args:
            x: segments of so many frames each, one after the other.
        """
        y: Tensor = self.bn(self._convolve(x, frames))
        return y

    def _convolve(self, x: Float[Tensor, "NT C H W"], frames: int) -> Float[Tensor, "NT C2 H2 W2"]:
        weight, stride = self.conv.weight, self.conv.stride[-1]
        time, space = weight.shape[2:4]
        if space > 1:
            return F.conv2d(x, weight[:, :, 0], stride=stride, padding=space // 2)
        if time == 1:
            return convolve_pixels(x, weight.flatten(1), stride=stride)
        assert stride == 1
        # A 2-D convolution over (time, places).
        places = rearrange(x, "(n t) c h w -> n t (h w) c", t=frames).permute(0, 3, 1, 2)
        y = F.conv2d(places, weight.flatten(3), padding=(time // 2, 0)).permute(0, 2, 3, 1)
        return rearrange(y, "n t (h w) c -> (n t) h w c", h=x.shape[2]).permute(0, 3, 1, 2)


class Bottleneck3d(nn.Module):
    """Reduce (over time where inflated), look around in space, expand; with a shortcut.

    Source: SlowFast's slow pathway (arXiv:1812.03982): a temporal kernel is 3x1x1 and sits in the first
    convolution, and no convolution strides over time.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int, inflate: bool) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.reduce = ConvNorm(in_channels, channels, kernel=(3 if inflate else 1, 1))
        self.spatial = ConvNorm(channels, channels, kernel=(1, 3), stride=stride)
        self.expand = ConvNorm(channels, out_channels, kernel=(1, 1))
        self.shortcut: ConvNorm | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, kernel=(1, 1), stride=stride)

    def forward(self, x: Float[Tensor, "NT C H W"], frames: int) -> Float[Tensor, "NT C2 H2 W2"]:
        """One block; a stride of 2 halves height and width, never time."""
        y = F.relu_(self.reduce(x, frames))
        y = F.relu_(self.spatial(y, frames))
        y = self.expand(y, frames)
        return F.relu_(y.add_(x if self.shortcut is None else self.shortcut(x, frames)))


class SlowOnly(nn.Module):
    """A 3-D ResNet that keeps every frame to its end, then averages over time and space.

    Source: PoseConv3D's SlowOnly (arXiv:2104.13586), as used in arXiv:2312.00856, section 3. Differs: width,
    number of stages, blocks and input channels are free.
    Shapes: N segments, C channels, T frames, H = W = config.size_px, D = config.token_width.

    Args:
        config: width and blocks of each stage; the first stage has no temporal convolution.
        in_channels: C; 3 for coloured heatmaps, 1 for grey ones.
    """

    def __init__(self, config: HeatmapEncoderConfig, *, in_channels: int) -> None:
        super().__init__()
        self.stem = ConvNorm(in_channels, config.width, kernel=(1, 7))
        self.stages = nn.ModuleList()
        channels_in = config.width
        for stage, blocks in enumerate(config.blocks):
            channels = config.width * 2**stage
            layers = nn.ModuleList()
            for block in range(blocks):
                layers.append(Bottleneck3d(channels_in, channels, stride=2 if block == 0 else 1, inflate=stage > 0))
                channels_in = EXPANSION * channels
            self.stages.append(layers)
        self.apply(init_conv)

    def forward(self, x: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N D"]:
        """One token a segment."""
        segments, frames = len(x), x.shape[2]
        x = rearrange(x, "n c t h w -> (n t) c h w").contiguous(memory_format=torch.channels_last)
        x = F.relu_(self.stem(x, frames))  # (N T) width H W
        x = F.max_pool2d(x, 3, stride=1, padding=1)
        for stage in self.stages:
            for block in stage.children():
                x = block(x, frames)  # at last channels have doubled and space has halved
        return rearrange(x, "(n t) c h w -> n t c h w", n=segments).mean(dim=(1, 3, 4))  # N D
