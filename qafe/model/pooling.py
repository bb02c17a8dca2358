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
        size = [(side - 1) // stride + 1 for side in x.shape[-2:]]
        y = x.new_empty(*x.shape[:2], *size)
        places = torch.empty_like(y, dtype=torch.int64)
        frames = max(1, _CHUNK_VALUES // max(1, x[0].numel()))
        for some, *out in zip(*(torch.split(whole, frames) for whole in (x, y, places)), strict=True):
            last = some.contiguous(memory_format=torch.channels_last)
            found = F.max_pool2d(last, 3, stride=stride, padding=1, return_indices=True)
            for part, values in zip(out, found, strict=True):
                part.copy_(values)
        ctx.stride, ctx.shape = stride, x.shape
        ctx.save_for_backward(places)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        # Of what was pooled only the shape is read, so that it need not be kept: any tensor of that shape will do.
        of_x = gradient.new_empty(ctx.shape)
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            gradient.contiguous(), of_x, [3, 3], [ctx.stride] * 2, [1, 1], [1, 1], False, places, grad_input=of_x
        )
        return of_x, None
