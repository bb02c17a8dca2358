"""qafe/data/compiled.py: what `qafe.data.heatmap` and `qafe.data.frames` do not show of it."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from qafe.data import compiled


def test_loops_are_compiled_where_no_folder_can_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def refuses(**flags: Any) -> Callable[..., Any]:
        if flags.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**flags)  # type: ignore[no-any-return]

    monkeypatch.setattr(numba, "njit", refuses)
    function = compiled._compiled(lambda value: value + 1)
    assert function(2) == 3
    assert function.signatures


@pytest.mark.parametrize("read_only", [False, True])
def test_rows_of_a_larger_picture_are_scaled(read_only: bool) -> None:
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (9, 8, 3), np.uint8)
    frame.flags.writeable = not read_only
    scale, shift = rng.random((2, 15), np.float32)
    rows, out = frame[2:6, 1:6].reshape(4, 15), np.empty((4, 15), np.float32)
    compiled.scale_and_shift(rows, scale, shift, out)
    np.testing.assert_allclose(out, rows * scale + shift, rtol=1e-6)


def test_points_reach_their_windows_and_the_blur() -> None:
    points = np.array([[[10, 20], [np.nan, 1]], [[12.9, 30.2], [-50, 3]]], np.float32)
    assert compiled.reach(points, 64, 3, 2) == (20 - 3 - 2, 30 + 4 + 2, 10 - 3 - 2, 12 + 4 + 2)
    assert compiled.reach(points, 64, 30, 2) == (0, 62 + 1, 0, 43 + 2)
    assert compiled.reach(points[:, 1:], 64, 3, 2) == (0, 0, 0, 0)
