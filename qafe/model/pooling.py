"""Max pooling as both encoders do it: 3 x 3 pixels, a border of one."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def max_pool(x: Float[Tensor, "N C H W"], *, stride: int) -> Float[Tensor, "N C H2 W2"]:
    """The largest of each 3 x 3 pixels, `stride` pixels apart.

    torch's own, but for the gradient on a CPU, which is made without the input: that need not be kept. For
    ``channels_last``, in which torch's is fast.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.max_pool2d(x, 3, stride=stride, padding=1)
    y: Tensor = _MaxPool.apply(x, stride)  # type: ignore[no-untyped-call]
    return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        y, places = F.max_pool2d(x, 3, stride=stride, padding=1, return_indices=True)
        ctx.stride, ctx.shape = stride, x.shape
        ctx.save_for_backward(places)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        last = torch.channels_last
        # Of what was pooled only the shape is read: any tensor of that shape will do.
        of_x = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=last)
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            gradient.contiguous(memory_format=last),
            of_x,
            [3, 3],
            [ctx.stride] * 2,
            [1, 1],
            [1, 1],
            False,
            places.contiguous(memory_format=last),
            grad_input=of_x,
        )
        return of_x, None
