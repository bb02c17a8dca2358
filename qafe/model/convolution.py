"""The encoders' convolutions on a CPU, in ``channels_last``: what oneDNN is slow or wrong at is done otherwise."""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FRAMES = 16
"""Whose pixels are sorted at a time: copies that are small, and products that are large."""
_FEWEST_CHANNELS = 64
"""From which on products of matrices are faster than oneDNN."""


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution with a border of one and no bias; otherwise torch's.

    On a CPU it is meant for ``channels_last``, in which oneDNN is a tenth faster forwards and for the gradient of the
    input, but slower for that of many channels' weights: the latter is computed here, in two thirds of oneDNN's time.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C2 H2 W2"]:
        """A stride of 2 halves height and width."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad and not torch.is_autocast_enabled("cpu")
        plain = x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()  # Not a FakeTensor.
        if not trains or not plain or min(self.weight.shape[:2]) < _FEWEST_CHANNELS:
            return super().forward(x)
        y: Tensor = _Conv3x3.apply(x, self.weight, self.stride[0])  # type: ignore[no-untyped-call]
        return y


class Conv1x1(nn.Conv2d):
    """A 1 x 1 convolution without bias; otherwise torch's.

    On a CPU it is `convolve_pixels`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C2 H2 W2"]:
        """A stride of 2 halves height and width."""
        if x.device.type != "cpu":
            return super().forward(x)
        return convolve_pixels(x, self.weight.flatten(1), stride=self.stride[0])


def convolve_pixels(
    x: Float[Tensor, "N C H W"], weight: Float[Tensor, "C2 C"], *, stride: int
) -> Float[Tensor, "N C2 H2 W2"]:
    """A convolution without extent, as a product of matrices.

    oneDNN's gradient of such weights writes beyond its memory for a stride of 2 and up to 6 channels of the input
    (torch 2.13, AVX2, ``channels_last``).
    """
    seen = x[..., ::stride, ::stride].permute(0, 2, 3, 1)
    return F.linear(seen, weight).permute(0, 3, 1, 2)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, stride=stride, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            stride, border, no = [ctx.stride] * 2, [1, 1], [0, 0]
            of_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, border, border, False, no, 1, [True, False, False]
            )
        return of_x, _weight_gradient(x, gradient, ctx.stride), None


def _weight_gradient(
    x: Float[Tensor, "N C H W"], gradient: Float[Tensor, "N C2 H2 W2"], stride: int
) -> Float[Tensor, "C2 C 3 3"]:
    """For each of the nine weights: the gradients of the output's pixels, times the pixels that the weight saw there.

    With frames innermost, the pixels that one weight sees lie in unbroken strips: a strip is a product of matrices,
    and what lies outside the frame takes no part in it, a fifth of the pixels of the paper's last stage.
    """
    kernel = gradient.new_zeros(3, 3, gradient.shape[1], x.shape[1])
    sides = zip(x.shape[2:], gradient.shape[2:], strict=True)
    rows, columns = ([_inside(tap, stride, *side) for tap in range(3)] for side in sides)
    for frames, of_frames in zip(*(torch.split(whole, _FRAMES) for whole in (x, gradient)), strict=True):
        behind = of_frames.permute(2, 3, 0, 1).contiguous()  # H2 W2 n C2
        # Of the columns that are `stride` apart, a strip of the output sees unbroken ones.
        seen = [frames.permute(2, 3, 0, 1)[:, first::stride].contiguous() for first in range(stride)]
        for tap, (row, column) in zip(product(range(3), repeat=2), product(rows, columns), strict=True):
            shift, first = divmod(tap[1] - 1, stride)
            top, height = stride * row.start + tap[0] - 1, row.stop - row.start
            strips = behind[row, column].flatten(1, 2)
            pixels = seen[first][top : top + stride * height : stride, column.start + shift : column.stop + shift]
            kernel[tap].addbmm_(strips.transpose(1, 2), pixels.flatten(1, 2))
    return kernel.permute(2, 3, 0, 1)


def _inside(tap: int, stride: int, side: int, out_side: int) -> slice:
    """The rows (or columns) of the output where this weight sees a row of the frame."""
    return slice(int(tap == 0), min(out_side, (side - tap) // stride + 1))
