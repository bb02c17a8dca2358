"""SlowOnly: the heatmap frames of one segment -> one heatmap token."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import HeatmapEncoderConfig
from .pooling import max_pool
from .transformer import init_conv

EXPANSION = 4
"""A bottleneck's output has this many times its inner channels (arXiv:1512.03385)."""


class ConvNorm(nn.Module):
    """A 3-D convolution and its batch norm; kernel and stride are (time, space)."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        time, space = kernel
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            (time, space, space),
            stride=(1, stride, stride),
            padding=(time // 2, space // 2, space // 2),
            bias=False,
        )
        self.bn = nn.BatchNorm3d(out_channels)

    def forward(self, x: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N C2 T H2 W2"]:
        """Convolution, then norm."""
        y: Tensor = self.bn(self._convolve(x))
        return y

    def _convolve(self, x: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N C2 T H2 W2"]:
        weight = self.conv.weight
        if weight.shape[-1] > 1:
            y: Tensor = self.conv(x)
            return y
        # A kernel without extent in space is a 2-D one over (time, places), for which there is faster code: a
        # tenth of the time on a CPU, and the view costs nothing.
        stride = self.conv.stride[-1]
        if stride > 1:
            x = x[..., ::stride, ::stride]
        flat = F.conv2d(x.flatten(3), weight.flatten(3), padding=(weight.shape[2] // 2, 0))
        return flat.reshape(*flat.shape[:3], *x.shape[3:])


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
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, kernel=(1, 1), stride=stride)

    def forward(self, x: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N C2 T H2 W2"]:
        """One block; a stride of 2 halves height and width, never time."""
        y = F.relu_(self.reduce(x))
        y = F.relu_(self.spatial(y))
        return F.relu_(self.expand(y).add_(self.shortcut(x)))


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
            layers = nn.Sequential()
            for block in range(blocks):
                layers.append(Bottleneck3d(channels_in, channels, stride=2 if block == 0 else 1, inflate=stage > 0))
                channels_in = EXPANSION * channels
            self.stages.append(layers)
        self.apply(init_conv)

    def forward(self, x: Float[Tensor, "N C T H W"]) -> Float[Tensor, "N D"]:
        """One token a segment."""
        x = F.relu_(self.stem(x))  # N width T H W
        x = max_pool(x.flatten(0, 1), stride=1).reshape(x.shape)  # N width T H W
        for stage in self.stages:
            x = stage(x)  # channels double and space halves
        return x.mean(dim=(2, 3, 4))  # N D
