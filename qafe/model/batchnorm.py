"""Batch norm's statistics: over the clips of all processes, and left alone while a forward pass is made again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of the clips of all processes; in evaluation an ordinary batch norm.

    Every process of torch's default group must make the same forward and backward passes. A gradient that reaches
    the input is that of the sum of all processes' losses; those of weight and bias are this process's summand.
    Source: torch.nn.SyncBatchNorm, with its parameters and buffers. Differs: needs no GPU, takes part in
    `statistics_kept`, and can leave this process out of the statistics.
    Shapes: N rows, C channels, then any extent.

    Args:
        norm: the batch norm to take parameters, buffers and settings from, which are shared and not copied.

    Attributes:
        counted: this process's rows count; False for a process that has no clip of its own in a batch and goes
            through the model with another's, for its collectives. Must stay as it is until the backward pass.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.affine
        assert norm.track_running_stats
        assert norm.momentum is not None
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self.training = norm.training
        self.counted = True

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    @torch._disable_dynamo  # type: ignore[attr-defined]  # The public one imports the compiler: 2 s.
    def forward(self, input: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
        """Normalises, and in training moves the running statistics."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            mean, variance, count = _statistics(input, self.counted)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        y: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean, variance, count, self.eps, self.counted
        )
        return y


def synchronise(module: nn.Module) -> None:
    """Puts a `SyncBatchNorm` in the place of every batch norm; parameters, buffers and their names stay."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                parent.add_module(name, SyncBatchNorm(child))


def set_counted(module: nn.Module, counted: bool) -> None:
    """Sets `SyncBatchNorm.counted` of all norms inside."""
    for norm in module.modules():
        if isinstance(norm, SyncBatchNorm):
            norm.counted = counted


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within the block, batch norms in training mode normalise as ever but do not move their running statistics.

    A pass that is made twice, by gradient checkpointing or by `qafe.train`'s accumulation, must count once.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not track_running_stats=False: a pass without the buffers saves other tensors, which checkpointing refuses.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _statistics(
    x: Float[Tensor, "N C ..."], counted: bool
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, ""]]:
    """Mean and biased variance of each channel over all processes' rows, and the number of values of a channel.

    Source: the pairwise combination of Chan, Golub and LeVeque (1979), which loses no digits where the mean is large.
    """
    channels = x.shape[1]
    if counted:
        variance, mean = torch.var_mean(x.float(), _all_but_channels(x), correction=0)
        own = torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])
    else:
        own = torch.zeros(2 * channels + 1, device=x.device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    means, variances, counts = torch.split(torch.stack(gathered), [channels, channels, 1], dim=1)  # P C, P C, P 1
    count = counts.sum()
    mean = (counts * means).sum(dim=0) / count
    variance = (counts * (variances + (means - mean) ** 2)).sum(dim=0) / count
    return mean, variance, count


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, where mean and variance are those of all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
        counted: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.counted = eps, counted
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        # With fixed statistics, the gradients of weight and bias are the two sums that the input's is made of.
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([of_weight, of_bias])  # 2 C
        dist.all_reduce(sums)
        scale = torch.rsqrt(variance + ctx.eps)
        shape = (-1, *[1] * (x.dim() - 2))  # C 1 ...
        slope = (weight * scale).view(shape)
        along, level = (part.view(shape) for part in sums / count)
        of_x = slope * gradient
        if ctx.counted:  # Other rows do not move the statistics.
            of_x -= slope * (level + (x - mean.view(shape)) * scale.view(shape) * along)
        return of_x.to(x.dtype), of_weight, of_bias, None, None, None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]
