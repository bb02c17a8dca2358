"""The whole network and its encoders: shapes, row order, errors, and that it learns."""

import pytest
import torch
from torch import Tensor, nn

from qafe.config import Config, HeatmapEncoderConfig, RGBEncoderConfig, paper, small, tiny
from qafe.dotted import override
from qafe.errors import ConfigError
from qafe.model.heatmap3d import SlowOnly
from qafe.model.qafenet import QAFENet, build
from qafe.model.spatial import SpatialFormer
from qafe.model.temporal import TemporalFormer

BASE = override(
    tiny(),
    {
        "model.segments": 5,
        "model.segment_frames": 8,
        "model.rgb.size_px": 32,
        "model.rgb.width": 8,
        "model.rgb.spatial_heads": 4,
        "model.rgb.temporal_heads": 4,
        "model.rgb.spatial_mlp": 64,
        "model.rgb.temporal_mlp": 128,
        "model.heatmap.size_px": 28,
        "model.heatmap.width": 4,
        "model.heatmap.blocks": (1, 1, 1),
        "model.fusion.width": 64,
        "model.fusion.layers": 2,
        "model.fusion.heads": 4,
        "data.heatmap.colour": "jet",
    },
)
"""The sizes that the numbers below are about, whatever the preset is tuned to."""


def make(config: Config = BASE, seed: int = 0) -> QAFENet:
    torch.manual_seed(seed)
    return build(config)


def clips(config: Config = BASE, count: int = 2, *, segments: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    model, channels = config.model, config.data.heatmap.channels
    frames = (segments or model.segments) * model.segment_frames
    rgb, heatmap = model.rgb.size_px, model.heatmap.size_px
    return (
        torch.randn(count, 3, frames, rgb, rgb, generator=generator),
        torch.rand(count, channels, frames, heatmap, heatmap, generator=generator),
    )


def test_one_score_a_clip() -> None:
    config = BASE
    net = make(config).eval()
    rgb, heatmap = clips(config, 3)
    scores = net(rgb, heatmap)
    assert scores.shape == (3,)
    assert torch.allclose(scores[1:2], net(rgb[1:2], heatmap[1:2]), atol=1e-5), "clips do not touch each other"
    assert torch.equal(scores, net(rgb, heatmap))
    tokens = net.encode_rgb(rgb), net.encode_heatmap(heatmap)
    assert torch.equal(scores, net.score(*tokens))


@pytest.mark.parametrize("order", ["corrected", "reference"])
def test_tokens_are_of_their_own_segment_and_clip(order: str) -> None:
    config = override(BASE, {"model.rgb_axis_order": order})
    net = make(config).eval()
    rgb, heatmap = clips(config)
    before = net.encode_rgb(rgb), net.encode_heatmap(heatmap)
    frames = config.model.segment_frames
    rgb[1, :, 3 * frames : 4 * frames] += 1
    heatmap[1, :, 3 * frames : 4 * frames] += 1
    for old, new in zip(before, (net.encode_rgb(rgb), net.encode_heatmap(heatmap)), strict=True):
        changed = (old != new).any(dim=2)
        assert changed.nonzero().tolist() == [[1, 3]]


def test_axis_orders_differ() -> None:
    rgb, _ = clips()
    right, published = (
        make(override(BASE, {"model.rgb_axis_order": order})).eval() for order in ("corrected", "reference")
    )
    assert not torch.allclose(right.encode_rgb(rgb), published.encode_rgb(rgb), atol=1e-4)


class Seen(nn.Module):
    """Keeps the frames that it is given."""

    def forward(self, frames: Tensor) -> Tensor:
        self.frames = frames
        return torch.zeros(len(frames), 64)


@pytest.mark.parametrize("order", ["corrected", "reference"])
def test_frames_that_the_rgb_encoder_sees(order: str) -> None:
    config = override(BASE, {"model.rgb_axis_order": order})
    net = make(config).eval()
    seen = Seen()
    net.spatial = seen  # type: ignore[assignment]
    # Every pixel says its clip (hundreds), frame (ones) and colour (tenths).
    colour, frame = torch.arange(3.0)[:, None] / 10, torch.arange(40.0)[None, :]
    value = torch.stack([colour + frame, 100 + colour + frame])
    net.encode_rgb(value[..., None, None].expand(2, 3, 40, 32, 32))
    rows = seen.frames[:, :, 0, 0].reshape(5, 2, 8, 3)  # segment clip frame colour
    if order == "corrected":
        assert torch.allclose(rows[2, 1, 5], torch.tensor([121.0, 121.1, 121.2]))
    else:
        assert torch.allclose(rows[2, 1].flatten(), (100 + colour + frame[:, 16:24]).flatten())


@pytest.mark.parametrize("preset", [tiny, small])
def test_gradient_reaches_every_trained_parameter(preset: type) -> None:
    config = preset()
    net = make(config).train()
    net(*clips(config)).sum().backward()
    missing = [
        name for name, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    ]
    assert missing == []


@pytest.mark.parametrize("mixer", ["none", "attention_pool"])
def test_other_numbers_of_segments(mixer: str) -> None:
    config = override(BASE, {"model.fusion.mixer": mixer})
    net = make(config).eval()
    for segments in (1, 3, 7):
        assert net(*clips(config, segments=segments)).shape == (2,)


def test_grey_heatmaps() -> None:
    config = override(BASE, {"data.heatmap.colour": "grey"})
    assert make(config)(*clips(config)).shape == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rgb, heat: (rgb[:, :, :39], heat[:, :, :39]), r"whole segments of 8 frames .*got 39.*Give 40"),
        (lambda rgb, heat: (rgb[:, :, :0], heat[:, :, :0]), "got 0 frames"),
        (
            lambda rgb, heat: (rgb[..., :30], heat),
            r"rgb frames must be 32 x 32 px \(model\.rgb\.size_px\), got 32 x 30",
        ),
        (lambda rgb, heat: (rgb, heat[..., :27, :27]), r"heatmap frames must be 28 x 28.*model\.heatmap\.size_px=27"),
        (lambda rgb, heat: (rgb, heat[:, :1]), r"3 channel\(s\).*got 1.*colour=grey"),
        (lambda rgb, heat: (rgb[:, :, :32], heat[:, :, :32]), r"conv1d.*10 tokens.*got 8"),
    ],
)
def test_refusals(change: object, message: str) -> None:
    net = make()
    with pytest.raises(ConfigError, match=message):
        net(*change(*clips()))  # type: ignore[operator]


def test_streams_of_different_clips_are_refused() -> None:
    rgb, heatmap = clips()
    # Through the check alone: in the tests the shapes in forward's signature are checked before it.
    with pytest.raises(ConfigError, match="same clips and frames, got 2 x 32 RGB and 2 x 40"):
        make()._check(rgb[:, :, :32], heatmap)
    with pytest.raises(ConfigError, match="got 1 x 40 RGB and 2 x 40 heatmap"):
        make()._check(rgb[:1], heatmap)


@pytest.mark.parametrize(
    "config",
    [
        RGBEncoderConfig(size_px=48, width=8, spatial_heads=4, spatial_depth=2),
        RGBEncoderConfig(size_px=64, width=4, spatial_heads=2, temporal_heads=2, spatial_depth=0, temporal_depth=0),
    ],
)
def test_rgb_encoder_of_any_size(config: RGBEncoderConfig) -> None:
    frames = torch.randn(35, 3, config.size_px, config.size_px)
    spatial = SpatialFormer(config).eval()
    features = spatial(frames)
    assert features.shape == (35, config.token_width)
    assert torch.allclose(features, spatial._encode(frames), atol=1e-6), "frames at a time change nothing"
    assert TemporalFormer(config, frames=7)(features.view(5, 7, -1)).shape == (5, config.token_width)


@pytest.mark.parametrize("blocks", [(1,), (2, 1), (1, 2, 1), (1, 1, 1, 2)])
def test_heatmap_encoder_of_any_depth(blocks: tuple[int, ...]) -> None:
    config = HeatmapEncoderConfig(size_px=17, width=4, blocks=blocks)
    encoder = SlowOnly(config, in_channels=1)
    assert encoder(torch.rand(2, 1, 5, 17, 17)).shape == (2, config.token_width)
    kernels = [stage[0].reduce.conv.kernel_size[0] for stage in encoder.stages]
    assert kernels == [1] + [3] * (len(blocks) - 1)


def test_streams_of_other_widths_are_projected() -> None:
    config = override(BASE, {"model.heatmap.width": "8", "model.fusion.width": "32"})
    net = make(config)
    assert isinstance(net.fusion.project_rgb, nn.Linear)
    assert net(*clips(config)).shape == (2,)
    published = QAFENet(paper().model)
    assert not list(published.fusion.project_rgb.parameters())


def test_a_new_network_says_something_small_about_each_clip() -> None:
    config = BASE
    scores = torch.stack([make(config, seed).eval()(*clips(config, 4)) for seed in range(5)])
    assert scores.abs().max() < 20
    assert torch.isfinite(scores).all()


def test_it_learns_four_clips_by_heart() -> None:
    config = override(BASE, {"model.segments": 2})
    net = make(config).train()
    inputs, target = clips(config, 4), torch.tensor([0.0, 1.0, 3.0, 4.0])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(*inputs), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_autocast_keeps_to_bfloat16() -> None:
    config = BASE
    net = make(config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = net(*clips(config))
    scores.float().sum().backward()
    assert torch.isfinite(scores).all()


@pytest.mark.gpu
def test_cpu_and_gpu_agree() -> None:
    net = make().eval()
    inputs = clips()
    on_cpu = net(*inputs)
    on_gpu = net.cuda()(*(x.cuda() for x in inputs)).cpu()
    assert torch.allclose(on_cpu, on_gpu, atol=1e-3)
