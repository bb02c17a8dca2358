"""What a fusion attends to, read beside its forward pass, which stays as fast as it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .fusion import AttentionPool, CrossLayer, Fusion

Maps = dict[str, NDArray[np.float64]]
"""Attention weights [S, M] by what they are, e.g. ``layer 1: rgb reads heatmap``: a row for each token that reads, a
column for each that is read; rows sum to 1. ``pool`` has one row, and the columns of all tokens: of both streams, the
heatmap's first, or of their sum."""


class Attention:
    """The weights that a fusion used, the mean over its heads, summed over clips.

    Attributes:
        clips: how many clips there were.
    """

    def __init__(self) -> None:
        self.clips = 0
        self._sums: dict[str, Tensor] = {}

    @property
    def sums(self) -> Maps:
        """Empty for a fusion that has no attention, or saw no clip."""
        return {name: total.double().cpu().numpy() for name, total in self._sums.items()}

    def add(self, name: str, weights: Tensor) -> None:
        """Weights [B, S, M] of some clips."""
        total = weights.sum(dim=0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total


@contextmanager
def attention_read(fusion: Fusion) -> Iterator[Attention]:
    """Collects what a fusion attends to in every forward pass within the block."""
    found = Attention()

    def count(module: nn.Module, tokens: tuple[Any, ...]) -> None:
        found.clips += len(tokens[0])

    def of_layer(number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(layer: nn.Module, tokens: tuple[Any, ...], _: Any) -> None:
            assert isinstance(layer, CrossLayer)
            for reader, weights in layer.attention(*tokens).items():
                other = "heatmap" if reader == "rgb" else "rgb"
                found.add(f"layer {number}: {reader} reads {other}", weights.mean(dim=1))

        return note

    def of_pool(pool: nn.Module, tokens: tuple[Any, ...], _: Any) -> None:
        assert isinstance(pool, AttentionPool)
        found.add("pool", pool.attention(*tokens))

    layers = [module for module in fusion.modules() if isinstance(module, CrossLayer)]
    handles = [fusion.register_forward_pre_hook(count)]
    handles += [layer.register_forward_hook(of_layer(number)) for number, layer in enumerate(layers, start=1)]
    if isinstance(fusion.mixer, AttentionPool):
        handles.append(fusion.mixer.register_forward_hook(of_pool))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def mean_maps(parts: Sequence[tuple[int, Maps]]) -> Maps:
    """The mean over all clips, from (clips, sums) of each process that saw some of them."""
    clips = sum(count for count, _ in parts)
    names = dict.fromkeys(name for _, sums in parts for name in sums)
    return {name: np.sum([sums[name] for _, sums in parts if name in sums], axis=0) / clips for name in names}
