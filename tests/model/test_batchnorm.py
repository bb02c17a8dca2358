"""qafe/model/batchnorm.py in one process: torch's numbers, as exact in ``channels_last``."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qafe.model import batchnorm
from qafe.model.batchnorm import BatchNorm2d, statistics_kept


def passes(norm: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output, all gradients, and the running statistics."""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    y.backward(gradient)
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


@pytest.mark.parametrize("shape", [(40, 3, 40, 40), (700, 3, 8, 8)])
def test_as_exact_as_the_usual_layout(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) + 2
    gradient = x + torch.randn(shape)  # Whose sums are large, and not what is left of cancelling summands.
    exact = passes(nn.BatchNorm2d(3).double(), x.double(), gradient.double())
    last = [values.contiguous(memory_format=torch.channels_last) for values in (x, gradient)]
    ours = passes(BatchNorm2d(3), *last)
    for own, true in zip(ours, exact, strict=True):
        assert (own - true).abs().max() <= 2e-6 * true.abs().max()


def test_a_repeated_pass_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "_CHUNK_ROWS", 4)
    norm = BatchNorm2d(3)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    first = norm(x)
    with statistics_kept(norm):
        again = norm(x)
    assert torch.equal(first, again)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))


def test_the_sums_of_a_gradient_can_be_taken_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernel reads the saved mean and inverse deviation, where the CPU's reads the running statistics."""
    monkeypatch.setattr(batchnorm, "_CHUNK_ROWS", 4)
    operator, seen = torch.ops.aten.native_batch_norm_backward, []

    def cuda_like(*args: Any) -> tuple[Tensor | None, ...]:
        gradient, x, _, _, _, mean, inverse, train, _, _ = args
        assert isinstance(mean, Tensor)
        assert isinstance(inverse, Tensor)
        assert not train
        normalised = (x - mean.view(-1, 1, 1)) * inverse.view(-1, 1, 1)
        found: tuple[Tensor | None, ...] = operator(*args)
        for ours, theirs in zip(
            found[1:], ((gradient * normalised).sum((0, 2, 3)), gradient.sum((0, 2, 3))), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        seen.append(x)
        return found

    monkeypatch.setattr(torch.ops.aten, "native_batch_norm_backward", cuda_like)
    x, gradient = (torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2))
    passes(BatchNorm2d(3), x, gradient)
    assert seen


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    starts, gradient = (torch.randn(4, 3, 8, 8), torch.rand(3) + 1, torch.zeros(3)), torch.randn(4, 3, 8, 8)
    found = []
    for device in ("cpu", "cuda"):
        x, weight, bias = (start.detach().clone().to(device).requires_grad_() for start in starts)
        variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
        count = torch.tensor(256.0, device=device)
        y = batchnorm._Normalise.apply(x, weight, bias, mean, variance, count, 1e-5, True, False)
        y.backward(gradient.to(device))
        found.append([one.grad.cpu() for one in (x, weight, bias)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
