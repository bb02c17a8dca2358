"""The 106-point face markup of InsightFace's ``2d106det``, by named group.

Source: the order in which InsightFace's landmark network returns its points; the 73 inner points (all but the
face contour) are the ones that QAFE-Net draws (arXiv:2312.00856).
"""

from .errors import ManifestError

CONTOUR = tuple(range(33))
LEFT_EYE = tuple(range(33, 43))
LEFT_BROW = tuple(range(43, 52))
MOUTH = tuple(range(52, 72))
NOSE = tuple(range(72, 87))
RIGHT_EYE = tuple(range(87, 97))
RIGHT_BROW = tuple(range(97, 106))
PUPILS = (34, 88)
"""The two eye centres; each is also counted among its eye's points."""

ALL_COUNT = 106
INNER = tuple(range(33, 106))
"""The 73 points that the published heatmaps draw."""

GROUPS: dict[str, tuple[int, ...]] = {
    "contour": CONTOUR,
    "left_eye": LEFT_EYE,
    "left_brow": LEFT_BROW,
    "mouth": MOUTH,
    "nose": NOSE,
    "right_eye": RIGHT_EYE,
    "right_brow": RIGHT_BROW,
    "pupils": PUPILS,
}

DRAWN: dict[str, tuple[int, ...]] = {
    "all": INNER,
    "eyes_brows": tuple(sorted(LEFT_EYE + LEFT_BROW + RIGHT_EYE + RIGHT_BROW)),
    "mouth": MOUTH,
    "nose": NOSE,
}
"""What each choice of ``data.heatmap.points`` draws, as indices into the 106 points."""


def columns(points: str, count: int) -> tuple[int, ...]:
    """Where the points of a choice stand in an array of 106 or of the 73 inner points.

    Raises:
        ManifestError: the array has neither 106 nor 73 points.
    """
    if count == ALL_COUNT:
        return DRAWN[points]
    if count == len(INNER):
        return tuple(index - INNER[0] for index in DRAWN[points])
    raise ManifestError(
        f"landmarks must hold {ALL_COUNT} or {len(INNER)} points, got {count}. Run python -m qafe prepare again."
    )
