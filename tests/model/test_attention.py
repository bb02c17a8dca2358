"""What is read of a fusion's attention, against the weights that its forward pass uses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qafe.config import ATTENTION_FUSIONS, Fusion
from qafe.model.attention import attention_read, mean_maps
from qafe.model.fusion import CrossBlock, CrossLayer

from .test_fusion import SEGMENTS, make, settings, tokens


def test_weights_by_hand() -> None:
    block = CrossBlock(settings().__class__(width=2, heads=1), gated=False)
    with torch.no_grad():
        block.query.weight.copy_(torch.eye(2))
        block.key.weight.copy_(torch.eye(2))
    # A norm of two features leaves their signs: (1, -1) or (-1, 1), up to its epsilon.
    x, other = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[5.0, 1.0], [1.0, 5.0]]])
    like, unlike = math.exp(2 / math.sqrt(2)), math.exp(-2 / math.sqrt(2))
    expected = torch.tensor([[[[like, unlike]]]]) / (like + unlike)
    torch.testing.assert_close(block.attention(x, other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(ATTENTION_FUSIONS))
def test_they_are_what_the_forward_pass_reads_with(kind: Fusion, monkeypatch: pytest.MonkeyPatch) -> None:
    fusion = make(settings(kind)).eval()
    layer = next(module for module in fusion.modules() if isinstance(module, CrossLayer))
    used: list[tuple[torch.Tensor, ...]] = []
    kernel = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        used.append((q, k, v))
        return kernel(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    rgb, heatmap = tokens()[0][..., :16], tokens()[1]
    rgb, heatmap = (F.pad(stream, (0, 24 - stream.shape[-1])) for stream in (rgb, heatmap))
    layer(rgb, heatmap)
    weights = layer.attention(rgb, heatmap)
    assert list(weights) == ["rgb", "heatmap"]
    for (q, k, v), found in zip(used, weights.values(), strict=True):
        torch.testing.assert_close(found @ v, kernel(q, k, v), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:-1]))


def test_the_mean_is_over_clips_however_they_are_batched() -> None:
    fusion = make(settings("cross", query="rgb", mixer="attention_pool")).eval()
    rgb, heatmap = tokens(clips=5)
    with torch.no_grad(), attention_read(fusion) as whole:
        out = fusion(rgb, heatmap)
    with torch.no_grad(), attention_read(fusion) as first:
        fusion(rgb[:2], heatmap[:2])
        fusion(rgb[2:3], heatmap[2:3])
    with torch.no_grad(), attention_read(fusion) as second:
        fusion(rgb[3:], heatmap[3:])
    with attention_read(fusion) as none:
        pass
    assert (whole.clips, first.clips, second.clips) == (5, 3, 2)
    found = mean_maps([(whole.clips, whole.sums)])
    assert list(found) == ["layer 1: rgb reads heatmap", "layer 2: rgb reads heatmap", "pool"]
    assert found["pool"].shape == (1, 2 * SEGMENTS)
    assert found["layer 2: rgb reads heatmap"].shape == (SEGMENTS, SEGMENTS)
    parts = mean_maps([(part.clips, part.sums) for part in (first, none, second)])
    for name, weights in found.items():
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(parts[name], weights, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(fusion(rgb, heatmap), out)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fusion.modules())


@pytest.mark.parametrize("kind", ["concat", "sum"])
def test_a_fusion_without_attention_has_none(kind: Fusion) -> None:
    fusion = make(settings(kind))
    with attention_read(fusion) as found:
        fusion(*tokens())
    assert (found.clips, found.sums) == (2, {})
    assert mean_maps([(found.clips, found.sums)]) == {}
