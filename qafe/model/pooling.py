"""Max pooling as both encoders do it: 3 x 3 pixels, a border of one."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def max_pool(x: Float[Tensor, "N C H W"], *, stride: int) -> Float[Tensor, "N C H2 W2"]:
    """The largest of each 3 x 3 pixels, `stride` pixels apart.

    On a CPU through `channels_last`, the only layout for which torch's forward pass is vectorised: with both changes
    of layout still a third of the time. Its backward pass is fast in the layout that the rest of the network has.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.max_pool2d(x, 3, stride=stride, padding=1)
    y: Tensor = _MaxPool.apply(x, stride)  # type: ignore[no-untyped-call]
    return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        y, indices = F.max_pool2d(last, 3, stride=stride, padding=1, return_indices=True)
        ctx.stride = stride
        ctx.save_for_backward(x, indices.contiguous())
        return y.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, indices = ctx.saved_tensors
        of_x = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient, x, [3, 3], [ctx.stride] * 2, [1, 1], [1, 1], False, indices
        )
        return of_x, None
