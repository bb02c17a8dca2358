"""qafe/data/augment.py: one draw for both streams, and where it lands."""

import numpy as np
import pytest

from qafe.config import AugmentConfig
from qafe.data.augment import CENTRE, ClipDraw, aligned_offset, crop_offset, draw_pair


def test_published_centre_crops() -> None:
    assert crop_offset(CENTRE, 256, 224) == (16, 16)
    assert crop_offset(CENTRE, 64, 56) == (4, 4)
    assert aligned_offset((16, 16), (256, 224), (64, 56)) == ((4, 4), (0.0, 0.0))


def test_joint_is_one_draw() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rgb, heatmap = draw_pair(rng, AugmentConfig())
        assert rgb is heatmap
    apart = [draw_pair(rng, AugmentConfig(joint=False)) for _ in range(400)]
    assert 0.4 < np.mean([rgb.flip != heatmap.flip for rgb, heatmap in apart]) < 0.6


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_is_a_probability(flip: float) -> None:
    rng = np.random.default_rng(0)
    assert {draw_pair(rng, AugmentConfig(flip=flip))[0].flip for _ in range(50)} == {bool(flip)}


def test_all_offsets_are_reached() -> None:
    rng = np.random.default_rng(0)
    offsets = {crop_offset(draw_pair(rng, AugmentConfig())[0], 64, 56) for _ in range(5000)}
    assert offsets == {(top, left) for top in range(9) for left in range(9)}


@pytest.mark.parametrize(("rgb", "heatmap"), [((256, 224), (64, 56)), ((128, 112), (64, 56)), ((37, 32), (32, 28))])
def test_aligned_centres_agree(rgb: tuple[int, int], heatmap: tuple[int, int]) -> None:
    for share in np.linspace(0, 1, 21):
        offset = crop_offset(ClipDraw(flip=False, top=share, left=1 - share), *rgb)
        whole, rest = aligned_offset(offset, rgb, heatmap)
        for place, start, left_over in zip(offset, whole, rest, strict=True):
            assert 0 <= start <= heatmap[0] - heatmap[1]
            assert abs(left_over) <= 0.5 + 1e-9
            centre = (start + left_over + heatmap[1] / 2) / heatmap[0]
            assert centre == pytest.approx((place + rgb[1] / 2) / rgb[0])
