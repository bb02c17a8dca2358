"""qafe/data/heatmap.py: worked values, the published pictures, and points that must not harm."""

import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from qafe.config import HeatmapConfig
from qafe.data import heatmap
from tests import reference


@pytest.fixture(params=["loops", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Draws everything here as a CPU does, and again as a GPU does."""
    if request.param == "torch":
        if request.node.get_closest_marker("gpu"):
            pytest.skip("draws on the GPU and on the CPU")
        monkeypatch.setattr(heatmap, "_in_loops", lambda _: False)
    return str(request.param)


PLAIN = HeatmapConfig(canvas_px=32, window_px=3, blur_px=0, colour="grey")


def points(*xy: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(xy, dtype=torch.float32)


@pytest.mark.parametrize("name", ["face", "rand", "sub"])
@pytest.mark.parametrize("sigma", [1, 2, 3])
def test_published_heatmaps(name: str, sigma: int) -> None:
    golden = reference.arrays("golden_heatmap")
    landmarks = torch.from_numpy(golden[f"{name}.landmarks"].astype(np.float32))[1:]  # The first is not drawn.
    config = HeatmapConfig(sigma_px=float(sigma))
    grey = heatmap.draw(landmarks, config)
    np.testing.assert_allclose(grey.numpy(), golden[f"{name}.s{sigma}.normalised"], atol=1e-6)
    rgb = (heatmap.colourise(grey) * 255).round().permute(1, 2, 0).numpy()
    wrong = np.abs(rgb - golden[f"{name}.s{sigma}.jet_bgr"][..., ::-1].astype(np.float32))
    assert wrong.max() <= 4  # One grey level is up to 4 levels of a colour.
    assert (wrong > 0).any(-1).mean() <= 1e-3


def test_published_resize() -> None:
    golden = reference.arrays("golden_heatmap")
    landmarks = torch.from_numpy(golden["face.landmarks"].astype(np.float32))[1:]
    got = heatmap.render(landmarks, HeatmapConfig(), resize_px=64) * 255
    image = Image.fromarray(np.ascontiguousarray(golden["face.s1.jet_bgr"][..., ::-1]))
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(got.numpy() - expected).max() < 1.01


def test_blur_kernel_is_the_published_table() -> None:
    golden = reference.arrays("golden_heatmap")["gauss_kernel7"]
    np.testing.assert_allclose(heatmap._blur_kernel(7), golden, atol=1e-7)


def test_one_point() -> None:
    grey = heatmap.draw(points((10, 20)), PLAIN)
    assert grey[20, 10] == 1
    assert grey[20, 11].item() == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert grey[18, 10].item() == pytest.approx(math.exp(-2), rel=1e-5)
    assert grey[21, 12].item() == pytest.approx(math.exp(-2.5), rel=1e-5)
    assert grey[20, 13] > 0
    assert grey[20, 14] == 0
    assert int((grey > 0).sum()) == 49


def test_subpixel_point_is_scaled_to_its_nearest_pixel() -> None:
    grey = heatmap.draw(points((10.4, 20)), PLAIN)
    assert grey[20, 10] == 1
    assert grey[20, 11].item() == pytest.approx(math.exp(-(0.36 - 0.16) / 2), rel=1e-5)


def test_two_points_add_up() -> None:
    grey = heatmap.draw(points((10, 20), (11, 20)), PLAIN)
    peak = 1 + math.exp(-0.5)
    assert grey[20, 9].item() == pytest.approx((math.exp(-0.5) + math.exp(-2)) / peak, rel=1e-5)
    assert grey.max() == 1


@pytest.mark.parametrize("blur", [3, 5, 7, 9, 11, 15])
def test_blur_is_opencvs(blur: int) -> None:
    landmarks = points((1, 2), (30, 16), (12, 12.5), (31, 31))
    config = HeatmapConfig(canvas_px=32, window_px=3, blur_px=blur, colour="grey")
    plain = sum(
        np.nan_to_num(heatmap.draw(point[None], PLAIN).numpy()) for point in landmarks
    )  # Each alone has peak 1.
    expected = cv2.GaussianBlur(plain, (blur, blur), 0)
    np.testing.assert_allclose(heatmap.draw(landmarks, config).numpy(), expected / expected.max(), atol=2e-6)


@pytest.mark.parametrize(
    "stray",
    [
        (1e9, 5),
        (-1e9, 5),
        (5, 1e9),
        (5, -1e9),
        (-1e9, -1e9),
        (36, 5),
        (-5, 5),
        (-4, 5),
        (math.nan, 5),
        (5, math.nan),
        (math.inf, 5),
        (-math.inf, math.inf),
    ],
)
@pytest.mark.parametrize("blur", [0, 7])
def test_a_point_outside_is_left_out(stray: tuple[float, float], blur: int) -> None:
    config = HeatmapConfig(canvas_px=32, window_px=3, blur_px=blur)
    good = points((10, 20), (15, 9))
    grey = heatmap.draw(torch.cat((points(stray), good)), config)
    torch.testing.assert_close(grey, heatmap.draw(good, config))


def test_a_point_just_outside_is_drawn_at_the_edge_as_published() -> None:
    grey = heatmap.draw(points((33, 16)), PLAIN)
    assert grey[16, 31] == 1
    assert HeatmapConfig(sigma_px=0.05).sigma_px == 0.05
    narrow = HeatmapConfig(canvas_px=32, sigma_px=0.05, window_px=3, blur_px=0)
    assert heatmap.draw(points((33, 16)), narrow)[16, 31] == 1  # exp(-800) alone would be 0 and 0/0.


def test_a_frame_without_points_is_dark() -> None:
    frames = heatmap.draw(torch.full((2, 3, 2), torch.nan), PLAIN)
    assert frames.shape == (2, 32, 32)
    assert not frames.any()
    jet = heatmap.render(torch.full((2, 3, 2), torch.nan), HeatmapConfig(canvas_px=32), resize_px=16)
    torch.testing.assert_close(jet[0, :, 5, 5] * 255, torch.tensor([0.0, 0.0, 128.0]))


@pytest.mark.parametrize("colour", ["jet", "grey"])
def test_batches_are_frames_side_by_side(colour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = HeatmapConfig(canvas_px=32, window_px=3, colour=colour)  # type: ignore[arg-type]
    landmarks = torch.rand(2, 5, 7, 2, generator=torch.Generator().manual_seed(0)) * 32
    whole = heatmap.render(landmarks, config, resize_px=16)
    assert whole.shape == (2, 5, config.channels, 16, 16)
    monkeypatch.setattr(heatmap, "_CPU_CHUNK_PIXELS", 3 * 32**2)
    monkeypatch.setattr(heatmap, "_GPU_CHUNK_PIXELS", 3 * 32**2)
    torch.testing.assert_close(heatmap.render(landmarks, config, resize_px=16), whole)
    torch.testing.assert_close(heatmap.render(landmarks[1, 3], config, resize_px=16), whole[1, 3])


def test_autocast_changes_nothing() -> None:
    landmarks = torch.rand(4, 7, 2, generator=torch.Generator().manual_seed(0)) * 256
    with torch.autocast("cpu", torch.bfloat16):
        under = heatmap.draw(landmarks, HeatmapConfig())
    assert torch.equal(under, heatmap.draw(landmarks, HeatmapConfig()))


def test_to_canvas_keeps_pixel_centres() -> None:
    corners = points((-0.5, -0.5), (255.5, 127.5), (127.5, 63.5))
    expected = points((-0.5, -0.5), (63.5, 63.5), (31.5, 31.5))
    torch.testing.assert_close(heatmap.to_canvas(corners, (128, 256), 64), expected)
    assert heatmap.to_canvas(corners, (256, 256), 256) is corners


def test_mirrored_points_draw_the_mirrored_frame() -> None:
    landmarks = (torch.rand(7, 2, generator=torch.Generator().manual_seed(0)) * 24 + 4).round()
    mirrored = heatmap.draw(heatmap.mirror(landmarks, 32), PLAIN)
    torch.testing.assert_close(mirrored, heatmap.draw(landmarks, PLAIN).flip(-1))


def slow(landmarks: torch.Tensor, config: HeatmapConfig) -> np.ndarray:
    """What `draw` means, in float64: an image for each point, pixel by pixel."""
    side, window = config.canvas_px, config.window_px
    total = np.zeros((side, side))
    for x, y in landmarks.tolist():
        image = np.zeros((side, side))
        if math.isfinite(x) and math.isfinite(y):
            distances = {
                (row, column): (column - x) ** 2 + (row - y) ** 2
                for row in range(max(0, int(y - window)), min(side, int(y + window + 1)))
                for column in range(max(0, int(x - window)), min(side, int(x + window + 1)))
            }
            for place, distance in distances.items():
                image[place] = math.exp((min(distances.values()) - distance) / (2 * config.sigma_px**2))
        total += image
    if config.blur_px > 1:
        total = cv2.GaussianBlur(total, (config.blur_px, config.blur_px), 0)
    return total / (total.max() or 1)


@pytest.mark.parametrize("seed", range(40))
def test_any_settings_draw_what_the_slow_way_draws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blur = int(rng.choice([0, 1, 3, 5, 7, 9, 15]))
    side = int(rng.integers(max(blur + 1, 4), 49))
    config = HeatmapConfig(
        canvas_px=side, sigma_px=float(rng.uniform(0.3, 5)), window_px=int(rng.integers(1, 9)), blur_px=blur
    )
    # Frames of points here and there; around the frame; in one corner; and of none that can be drawn.
    landmarks = rng.uniform(-12, side + 12, (6, 5, 2)).astype(np.float32)
    landmarks[1] = landmarks[1].round()
    landmarks[2] %= 4
    landmarks[3] = rng.choice([math.nan, math.inf, -math.inf, 1e9, -1e9, 1e30, 3, side - 1], (5, 2))
    landmarks[4] = math.nan
    drawn = heatmap.draw(torch.from_numpy(landmarks), config)
    expected = np.stack([slow(frame, config) for frame in torch.from_numpy(landmarks)])
    np.testing.assert_allclose(drawn.numpy(), expected, atol=3e-6)
    for frame, alone in zip(landmarks, drawn, strict=True):  # Others in the batch change what is drawn at a time.
        torch.testing.assert_close(heatmap.draw(torch.from_numpy(frame), config), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_landmarks_are_left_as_they_are(count: int) -> None:
    landmarks = torch.full((1, count, 2), torch.nan)
    assert not heatmap.draw(landmarks, PLAIN).any()
    assert landmarks.isnan().all()


def test_first_point_counts_where_it_is_drawn() -> None:
    store_points = torch.rand(3, 8, 2, generator=torch.Generator().manual_seed(0)) * 32
    whole = np.stack([slow(frame, PLAIN) for frame in store_points])
    rest = np.stack([slow(frame[1:], PLAIN) for frame in store_points])
    np.testing.assert_allclose(heatmap.draw(store_points, PLAIN).numpy(), whole, atol=2e-6)
    np.testing.assert_allclose(heatmap.draw(store_points[:, 1:], PLAIN).numpy(), rest, atol=2e-6)
    assert np.abs(whole - rest).max() > 0.1


@pytest.mark.parametrize("name", ["face", "rand", "sub"])
@pytest.mark.parametrize("sigma", [1, 2, 3])
def test_pictures_are_the_published_ones_to_the_last_pixel(name: str, sigma: int) -> None:
    golden = reference.arrays("golden_heatmap")
    landmarks = torch.from_numpy(golden[f"{name}.landmarks"].astype(np.float32))[1:]
    frames = heatmap.pictures(landmarks, HeatmapConfig(sigma_px=float(sigma)))
    assert frames.shape == (256, 256, 3)
    np.testing.assert_array_equal(frames.numpy(), golden[f"{name}.s{sigma}.jet_bgr"][..., ::-1])


def test_pictures_are_the_coloured_drawing() -> None:
    landmarks = torch.rand(2, 5, 7, 2, generator=torch.Generator().manual_seed(0)) * 60 - 14
    config = HeatmapConfig(canvas_px=32, window_px=3)
    coloured = heatmap.colourise(heatmap.draw(landmarks, config)) * 255
    frames = heatmap.pictures(landmarks, config)
    assert frames.dtype == torch.uint8
    torch.testing.assert_close(frames.movedim(-1, -3).float(), coloured)


@pytest.mark.parametrize(("canvas", "levels"), [(32, 0), (48, 0), (64, 0), (50, 1)])
def test_jet_is_resized_as_pillow_does(canvas: int, levels: int) -> None:
    landmarks = torch.rand(4, 7, 2, generator=torch.Generator().manual_seed(0)) * canvas
    config = HeatmapConfig(canvas_px=canvas, window_px=3)
    got = (heatmap.render(landmarks, config, resize_px=16) * 255).round().byte()
    for frame, picture in zip(got, heatmap.pictures(landmarks, config), strict=True):
        image = Image.fromarray(np.ascontiguousarray(picture.numpy())).resize((16, 16), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(frame.permute(1, 2, 0).int().numpy(), np.asarray(image, np.int32), atol=levels)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [HeatmapConfig(), HeatmapConfig(canvas_px=64), HeatmapConfig(colour="grey")])
def test_gpu_equals_cpu(config: HeatmapConfig) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    landmarks = torch.rand(40, 73, 2, generator=torch.Generator().manual_seed(0)) * config.canvas_px
    landmarks[3], landmarks[4, :9] = torch.nan, -1e9
    on_gpu = landmarks.cuda()
    heatmap.render(on_gpu[:1], config, resize_px=64)  # Tables go to the device once.
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn, frames = heatmap.draw(on_gpu, config), heatmap.render(on_gpu, config, resize_px=64)
        pictures = heatmap.pictures(on_gpu, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(drawn.cpu(), heatmap.draw(landmarks, config), atol=2e-6, rtol=0)
    # A value at the edge of a level may fall to either side: a grey level is up to 4 levels of a colour.
    for got, expected in (
        (pictures.cpu() / 255, heatmap.pictures(landmarks, config) / 255),
        (frames.cpu(), heatmap.render(landmarks, config, resize_px=64)),
    ):
        wrong = (got - expected).abs()
        assert wrong.max() < 4.1 / 255
        assert (wrong > 1e-5).float().mean() < 1e-4


@pytest.mark.gpu
def test_gpu_draws_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    landmarks = torch.rand(40, 73, 2, generator=torch.Generator().manual_seed(0)) * 256
    got = heatmap.render(landmarks.cuda(), HeatmapConfig(), resize_px=64).cpu()
    wrong = (got - heatmap.render(landmarks, HeatmapConfig(), resize_px=64)).abs()
    assert wrong.max() < 0.02
    assert wrong.mean() < 1e-4
