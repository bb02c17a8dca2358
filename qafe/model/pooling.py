"""Max pooling as both encoders do it: 3 x 3 pixels, a border of one."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_VALUES = 2**20
"""What changes its layout at a time: it stays in a CPU's caches."""


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
        parts = []
        for part in torch.split(x, max(1, _CHUNK_VALUES // max(1, x[0].numel()))):
            last = part.contiguous(memory_format=torch.channels_last)
            y, indices = F.max_pool2d(last, 3, stride=stride, padding=1, return_indices=True)
            parts.append((y.contiguous(), indices.contiguous()))
        whole, places = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        ctx.stride, ctx.shape = stride, x.shape
        ctx.save_for_backward(places)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        # Of what was pooled only the shape is read, so that it need not be kept: any tensor of that shape will do.
        of_x = gradient.new_empty(ctx.shape)
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            gradient, of_x, [3, 3], [ctx.stride] * 2, [1, 1], [1, 1], False, places, grad_input=of_x
        )
        return of_x, None
