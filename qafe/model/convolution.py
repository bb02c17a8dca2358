"""1 x 1 convolutions on a CPU, in ``channels_last``, where oneDNN's are wrong."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
