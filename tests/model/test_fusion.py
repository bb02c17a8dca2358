"""One contract for every fusion, query direction, position and mixer."""

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from qafe.config import ATTENTION_FUSIONS, Fusion, FusionConfig, Mixer, Position, Query
from qafe.errors import ConfigError
from qafe.model.fusion import FUSIONS, MIXERS, DropPath
from qafe.model.fusion import Fusion as FusionModule

SEGMENTS, RGB, HEATMAP, WIDTH = 3, 24, 16, 24
ALL = list(product(get_args(Fusion), get_args(Query), get_args(Position), get_args(Mixer)))


def make(config: FusionConfig, seed: int = 0) -> FusionModule:
    torch.manual_seed(seed)
    return FUSIONS[config.kind](config, rgb_width=RGB, heatmap_width=HEATMAP, segments=SEGMENTS)


def settings(kind: Fusion = "cross", query: Query = "both", position: Position = "heatmap", mixer: Mixer = "conv1d"):
    return FusionConfig(kind=kind, query=query, position=position, mixer=mixer, width=WIDTH, layers=2, heads=4)


def tokens(segments: int = SEGMENTS, clips: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(clips, segments, RGB, generator=generator),
        torch.randn(clips, segments, HEATMAP, generator=generator),
    )


def expected_tokens(kind: str, mixer: str, segments: int) -> int:
    return 1 if mixer == "attention_pool" else segments * (1 if kind == "sum" else 2)


def test_every_setting_has_a_builder() -> None:
    assert set(FUSIONS) == set(get_args(Fusion))
    assert set(MIXERS) == set(get_args(Mixer))


@pytest.mark.parametrize(("kind", "query", "position", "mixer"), ALL)
def test_contract(kind: Fusion, query: Query, position: Position, mixer: Mixer) -> None:
    config = replace(settings(kind, query, position, mixer), dropout=0.3, drop_path=0.3)
    fusion = make(config).eval()
    rgb, heatmap = (x.requires_grad_() for x in tokens())

    out = fusion(rgb, heatmap)
    assert out.shape == (2, expected_tokens(kind, mixer, SEGMENTS), WIDTH)
    assert torch.equal(out, fusion(rgb, heatmap)), "dropout is off in eval mode"
    assert torch.equal(out, make(config).eval()(rgb, heatmap)), "the seed decides the weights"
    assert torch.allclose(out[:1], fusion(rgb[:1], heatmap[:1]), atol=1e-6), "clips do not touch each other"

    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in [*fusion.named_parameters(), ("rgb", rgb), ("heatmap", heatmap)]:
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    if mixer == "conv1d":
        with pytest.raises(ConfigError, match=r"takes no other number.*got \d+ \(model\.fusion\.mixer\)"):
            fusion(*tokens(segments=5))
    else:
        for segments in (1, 2, 5):
            longer = fusion(*tokens(segments=segments))
            assert longer.shape == (2, expected_tokens(kind, mixer, segments), WIDTH)
            assert torch.isfinite(longer).all()


@pytest.mark.parametrize("kind", ATTENTION_FUSIONS)
@pytest.mark.parametrize("setting", ["dropout", "drop_path"])
def test_dropout_is_on_in_training(kind: Fusion, setting: str) -> None:
    fusion = make(replace(settings(kind), **{setting: 0.5})).train()
    inputs = tokens(clips=8)
    assert not torch.equal(fusion(*inputs), fusion(*inputs))
    assert torch.equal(make(settings(kind)).train()(*inputs), make(settings(kind)).eval()(*inputs))


@pytest.mark.parametrize("kind", ["concat", "sum"])
def test_token_dropout(kind: Fusion) -> None:
    fusion = make(replace(settings(kind), dropout=0.5)).train()
    assert not torch.equal(fusion(*tokens()), fusion(*tokens()))


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(20_000, 1, 1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.02)


def test_directions_share_weights_only_in_cross() -> None:
    size = {
        kind: sum(p.numel() for p in make(settings(kind)).layers.parameters())  # type: ignore[union-attr, operator]
        for kind in ATTENTION_FUSIONS
    }
    assert size["cross_split"] == 2 * size["cross"]
    assert size["gated"] > size["cross"]


def test_a_gate_starts_at_the_published_fusion() -> None:
    gated, published = make(settings("gated")), make(settings("cross"))
    state = {name: value for name, value in gated.state_dict().items() if ".gate." not in name}
    published.load_state_dict(state)
    assert torch.allclose(gated(*tokens()), published(*tokens()), atol=1e-6)
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if name.endswith("gate.bias"):
                parameter.fill_(-30)
    assert not torch.allclose(gated(*tokens()), published(*tokens()), atol=1e-3)


@pytest.mark.parametrize("kind", ATTENTION_FUSIONS)
@pytest.mark.parametrize(("query", "kept"), [("rgb", "heatmap"), ("heatmap", "rgb")])
def test_a_stream_that_does_not_read_keeps_its_tokens(kind: Fusion, query: Query, kept: str) -> None:
    fusion = make(settings(kind, query, "none", "none"))
    rgb, heatmap = tokens()
    out = fusion(rgb, heatmap)
    own = {"rgb": fusion.project_rgb(rgb), "heatmap": fusion.project_heatmap(heatmap)}
    halves = {"heatmap": out[:, :SEGMENTS], "rgb": out[:, SEGMENTS:]}
    assert torch.equal(halves[kept], own[kept])
    assert not torch.allclose(halves[query], own[query], atol=1e-3)


def test_streams_read_each_other() -> None:
    fusion = make(settings("cross", mixer="none"))
    rgb, heatmap = tokens()
    before = fusion(rgb, heatmap)
    changed = fusion(rgb, heatmap + 1)
    assert (before != changed)[:, SEGMENTS:].any(), "the RGB half changed with the heatmaps"


def test_sum_and_concat_by_hand() -> None:
    rgb, heatmap = torch.ones(1, SEGMENTS, WIDTH), torch.full((1, SEGMENTS, WIDTH), 2.0)
    plain = {"position": "none", "mixer": "none", "width": WIDTH, "heads": 4}
    built = {
        kind: FUSIONS[kind](
            FusionConfig(kind=kind, **plain),  # type: ignore[arg-type]
            rgb_width=WIDTH,
            heatmap_width=WIDTH,
            segments=SEGMENTS,
        )
        for kind in ("sum", "concat")
    }
    assert not list(built["sum"].parameters())
    assert torch.equal(built["sum"](rgb, heatmap), torch.full((1, SEGMENTS, WIDTH), 3.0))
    assert torch.equal(built["concat"](rgb, heatmap), torch.cat([heatmap, rgb], dim=1))


def test_positions_between_the_learned_ones_are_interpolated() -> None:
    fusion = make(settings("sum", position="heatmap", mixer="none"))
    assert fusion.position_rgb is None
    assert fusion.position_heatmap is not None
    with torch.no_grad():
        fusion.position_heatmap.copy_(torch.arange(3.0)[None, :, None].expand(1, 3, WIDTH))
        for parameter in (*fusion.project_rgb.parameters(), *fusion.project_heatmap.parameters()):
            parameter.zero_()
    rgb, heatmap = tokens(segments=6)
    out = fusion(rgb * 0, heatmap)
    assert out[0, :, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2])


def test_mixers_start_where_they_should() -> None:
    x = torch.randn(2, 6, WIDTH)
    assert torch.equal(MIXERS["conv1d"](WIDTH, 6)(x), x)
    assert torch.allclose(MIXERS["attention_pool"](WIDTH, 6)(x), x.mean(dim=1, keepdim=True), atol=1e-6)
