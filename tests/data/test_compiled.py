"""qafe/data/compiled.py: what `qafe.data.heatmap` and `qafe.data.frames` do not show of it."""

import numpy as np
import pytest
import torch

from qafe.data import compiled


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("side", "shifted"), [(5, 0), (16, 0), (48, 0), (48, 1)])
def test_crops_are_scaled(read_only: bool, flip: bool, side: int, shifted: int) -> None:
    """A width of whole blocks goes past the caches, if its place in memory allows; no number beside it changes."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (4, 9, side + 3, 3), np.uint8)
    video.flags.writeable = not read_only
    scale, shift = rng.random((2, 3), np.float32)
    numbers = torch.full((16 + 3 * 4 * side * 3 + 16,), 7.0).numpy()  # Torch's memory begins with a cache line.
    inside = slice(16 + shifted, len(numbers) - 16 + shifted)
    out = numbers[inside].reshape(3, 4, side, 3)
    compiled.scale_and_shift(video, np.array([2, 0, 2]), 3, 1, flip, scale, shift, out)
    crops = video[[2, 0, 2], 3:7, 1 : 1 + side]
    np.testing.assert_allclose(out, (crops[:, :, ::-1] if flip else crops) * scale + shift, rtol=1e-6)
    assert (np.delete(numbers, np.arange(len(numbers))[inside]) == 7).all()


def test_points_reach_their_windows_and_the_blur() -> None:
    points = np.array([[[10, 20], [np.nan, 1]], [[12.9, 30.2], [-50, 3]]], np.float32)
    assert compiled.reach(points, 64, 3, 2) == (20 - 3 - 2, 30 + 4 + 2, 10 - 3 - 2, 12 + 4 + 2)
    assert compiled.reach(points, 64, 30, 2) == (0, 62 + 1, 0, 43 + 2)
    assert compiled.reach(points[:, 1:], 64, 3, 2) == (0, 0, 0, 0)
