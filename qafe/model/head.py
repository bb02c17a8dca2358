"""The head: one token -> one number."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """An MLP with ReLU that scores each token by itself; its output has no bound.

    Source: arXiv:2312.00856, section 3 (512-256-128-1). Differs: the hidden widths are free.
    Shapes: B clips, N tokens, D feature width.

    Args:
        width: D.
        hidden: widths of the hidden layers.
    """

    def __init__(self, *, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [width, *hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.layers[-1] else "relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 1"]:
        """A score for each token."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        scores: Tensor = self.layers[-1](x)
        return scores
