"""One random draw for both streams of a clip. Pure functions.

Source: the QAFE-Net data loader flips and crops the RGB frames and the heatmaps of a clip by separate draws
(arXiv:2312.00856), which mirrors them against each other in half of the clips. Differs: one draw for both, unless
``data.augment.joint`` is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import AugmentConfig


@dataclass(frozen=True, slots=True)
class ClipDraw:
    """What is done to every frame of one stream of a clip: first the flip, then the crop."""

    flip: bool
    """Left-right mirrored."""
    top: float
    """Where the crop starts, as a share of the free margin in [0, 1]."""
    left: float


CENTRE = ClipDraw(flip=False, top=0.5, left=0.5)
"""What evaluation uses: no flip, centre crop."""


def draw_pair(rng: np.random.Generator, config: AugmentConfig) -> tuple[ClipDraw, ClipDraw]:
    """Draws for the RGB stream and the heatmap stream; the same object for both when ``config.joint``."""
    rgb = _draw(rng, config)
    return (rgb, rgb) if config.joint else (rgb, _draw(rng, config))


def crop_offset(draw: ClipDraw, resized_px: int, crop_px: int) -> tuple[int, int]:
    """(top, left) of a crop in pixels. The centre draw gives 16 of 256 to 224 and 4 of 64 to 56, as published."""
    margin = resized_px - crop_px
    assert margin >= 0, "a crop is never larger than its frame"
    # Every offset of 0..margin is equally likely for a uniform share.
    return min(int(draw.top * (margin + 1)), margin), min(int(draw.left * (margin + 1)), margin)


def aligned_offset(
    rgb_offset: tuple[int, int], rgb_px: tuple[int, int], heatmap_px: tuple[int, int]
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Where the heatmap crop must start so that both streams show the same part of the face.

    A heatmap pixel is several RGB pixels wide, so the whole-pixel offset alone would be up to half a heatmap
    pixel off. The rest is returned as well: landmarks moved by minus that much before they are drawn agree with
    the RGB crop exactly (centre on centre). For the published sizes and the centre crop the rest is zero.

    Args:
        rgb_offset: (top, left) of the RGB crop.
        rgb_px: (resized, crop) sides of the RGB frames.
        heatmap_px: (resized, crop) sides of the heatmap frames.
    Returns:
        (top, left) in whole heatmap pixels, and the (top, left) that remains, in heatmap pixels.
    """
    whole, rest = [], []
    for offset in rgb_offset:
        centre = (offset + rgb_px[1] / 2) / rgb_px[0]
        exact = centre * heatmap_px[0] - heatmap_px[1] / 2
        nearest = min(max(round(exact), 0), heatmap_px[0] - heatmap_px[1])
        whole.append(nearest)
        rest.append(exact - nearest)
    return (whole[0], whole[1]), (rest[0], rest[1])


def _draw(rng: np.random.Generator, config: AugmentConfig) -> ClipDraw:
    flip, top, left = rng.random(3)
    return ClipDraw(flip=bool(flip < config.flip), top=float(top), left=float(left))
