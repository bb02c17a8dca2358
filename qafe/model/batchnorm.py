"""Batch norm's statistics: exact, over the clips of all processes, and left alone while a pass is made again."""

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

_CHUNK_ROWS = 1024
"""Values of a channel that are summed at a time."""


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, with statistics and gradients that are as exact in ``channels_last`` on a CPU as in the usual layout.

    There torch sums all values of a channel into one float32: of half a million values, four digits are left. Here a
    thousand or so are summed at a time, in a CPU's caches; torch sums a few thousand well enough itself.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def forward(self, input: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """Normalises, and in training moves the running statistics."""
        plain = input.device.type == "cpu" and type(input) is Tensor and not torch.compiler.is_compiling()
        last = input.dtype == torch.float32 and input.is_contiguous(memory_format=torch.channels_last)
        count = input.numel() // self.num_features
        if not self.training or not plain or not last or count < 8 * _CHUNK_ROWS:
            return super().forward(input)
        with torch.no_grad():
            mean, variance = _mean_and_variance(input)
            _move_running_statistics(self, mean, variance * (count / (count - 1)))
        y: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean, variance, torch.tensor(float(count)), self.eps, True, False
        )
        return y


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
            _move_running_statistics(self, mean, variance * (count / (count - 1)))
        y: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean, variance, count, self.eps, self.counted, True
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
    """Mean and biased variance of each channel over all processes' rows, and the number of values of a channel."""
    channels = x.shape[1]
    if counted:
        mean, variance = _mean_and_variance(x.float())
        own = torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])
    else:
        own = torch.zeros(2 * channels + 1, device=x.device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    means, variances, counts = torch.split(torch.stack(gathered), [channels, channels, 1], dim=1)  # P C, P C, P 1
    return *_combined(means, variances, counts), counts.sum()


def _combined(
    means: Float[Tensor, "P C"], variances: Float[Tensor, "P C"], counts: Float[Tensor, "P 1"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance of parts together.

    Source: the pairwise combination of Chan, Golub and LeVeque (1979), which loses no digits where the mean is large.
    """
    count = counts.sum()
    mean = (counts * means).sum(dim=0) / count
    return mean, (counts * (variances + (means - mean) ** 2)).sum(dim=0) / count


def _mean_and_variance(x: Float[Tensor, "N C ..."]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Of each channel; the variance is the biased one."""
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        return mean, variance
    parts = _chunks(x)
    found = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
    means, variances = (torch.stack(one) for one in zip(*found, strict=True))
    return _combined(means, variances, means.new_tensor([[float(len(part))] for part in parts]))


def _chunks(x: Float[Tensor, "N C ..."]) -> tuple[Float[Tensor, "n C ..."], ...]:
    """What is summed at a time: a GPU sums exactly, and all at once."""
    rows = x.numel() // (len(x) * x.shape[1])
    return torch.split(x, max(1, _CHUNK_ROWS // rows)) if x.device.type == "cpu" else (x,)


def _move_running_statistics(norm: Any, mean: Float[Tensor, " C"], variance: Float[Tensor, " C"]) -> None:
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


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
        together: bool,
    ) -> Tensor:
        """Args: counted: x moved the statistics; together: so did other processes' rows."""
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.counted, ctx.together = eps, counted, together
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        gradient = gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        scale = torch.rsqrt(variance + ctx.eps)
        # With fixed statistics, the gradients of weight and bias are the two sums that the input's is made of. A CPU
        # takes the running statistics for them, a GPU the saved ones, which must be there (torch 2.13).
        parts = []
        for part, behind in zip(_chunks(x), _chunks(gradient), strict=True):
            _, *both = torch.ops.aten.native_batch_norm_backward(
                behind, part, weight, mean, variance, mean, scale, False, ctx.eps, [False, True, True]
            )
            parts.append(torch.stack(both))
        sums = torch.stack(parts).sum(dim=0)  # 2 C
        of_weight, of_bias = sums.clone()
        if ctx.together:
            dist.all_reduce(sums)
        shape = (-1, *[1] * (x.dim() - 2))  # C 1 ...
        slope, centre = (weight * scale).view(shape), mean.view(shape)
        along, level = (-slope * part.view(shape) for part in (sums[0] * scale / count, sums[1] / count))
        of_x = torch.empty_like(x)
        for part, behind, place in zip(*(_chunks(whole) for whole in (x, gradient, of_x)), strict=True):
            if ctx.counted:
                moved = part - centre  # What the row did to the statistics.
                place.copy_(torch.addcmul(level, moved, along, out=moved).addcmul_(behind, slope))
            else:  # Other rows do not move the statistics.
                torch.mul(behind, slope, out=place)
        return of_x, of_weight, of_bias, None, None, None, None, None, None
