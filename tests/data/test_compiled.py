"""qafe/data/compiled.py: what `qafe.data.heatmap` and `qafe.data.frames` do not show of it."""

import numpy as np
import pytest

from qafe.data import compiled


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_scaled(read_only: bool, flip: bool) -> None:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (4, 9, 8, 3), np.uint8)
    video.flags.writeable = not read_only
    of_colours = rng.random((2, 3), np.float32)
    scale, shift = np.tile(of_colours, 5)
    out = np.empty((3, 4, 15), np.float32)
    compiled.scale_and_shift(video, np.array([2, 0, 2]), 3, 1, flip, scale, shift, out)
    crops = video[[2, 0, 2], 3:7, 1:6]
    expected = (crops[:, :, ::-1] if flip else crops) * of_colours[0] + of_colours[1]
    np.testing.assert_allclose(out.reshape(3, 4, 5, 3), expected, rtol=1e-6)


def test_points_reach_their_windows_and_the_blur() -> None:
    points = np.array([[[10, 20], [np.nan, 1]], [[12.9, 30.2], [-50, 3]]], np.float32)
    assert compiled.reach(points, 64, 3, 2) == (20 - 3 - 2, 30 + 4 + 2, 10 - 3 - 2, 12 + 4 + 2)
    assert compiled.reach(points, 64, 30, 2) == (0, 62 + 1, 0, 43 + 2)
    assert compiled.reach(points[:, 1:], 64, 3, 2) == (0, 0, 0, 0)
