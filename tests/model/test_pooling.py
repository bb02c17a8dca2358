"""qafe/model/pooling.py: what torch's own pooling gives, to the bit."""

import pytest
import torch
import torch.nn.functional as F

from qafe.model.pooling import max_pool


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(8, 8), (7, 5)])
def test_values_and_gradients_are_those_of_torch(stride: int, side: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: most windows hold their maximum more than once.
    x = torch.randint(-2, 3, (2, 3, *side), generator=generator).float()
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, expected = max_pool(ours, stride=stride), F.max_pool2d(theirs, 3, stride=stride, padding=1)
    assert torch.equal(y, expected)
    assert y.is_contiguous()
    gradient = torch.randn(y.shape, generator=generator)
    y.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert ours.grad.is_contiguous()


def test_without_gradients() -> None:
    x = torch.randn(1, 2, 6, 6)
    with torch.inference_mode():
        assert torch.equal(max_pool(x, stride=2), F.max_pool2d(x, 3, stride=2, padding=1))
