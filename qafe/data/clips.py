"""Which frames of a video make a clip. Indices are 0-based.

Source: the QAFE-Net data loader (arXiv:2312.00856). Differs: a training clip may also end on the last frame.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def train_indices(frames: int, clip_frames: int, rng: np.random.Generator) -> Indices:
    """A run of consecutive frames from a random start; a video shorter than the clip loops from its start.

    Every possible start is equally likely, the last one included (the published code never draws that one).
    """
    assert min(frames, clip_frames) >= 1, "the manifest refuses empty videos"
    if frames <= clip_frames:
        return _looped(frames, clip_frames)
    start = int(rng.integers(0, frames - clip_frames + 1))
    return np.arange(start, start + clip_frames, dtype=np.int64)


def test_indices(frames: int, clip_frames: int) -> Indices:
    """Frames spread evenly from first to last (truncated to whole numbers, as published); short videos loop."""
    assert min(frames, clip_frames) >= 1, "the manifest refuses empty videos"
    if frames <= clip_frames:
        return _looped(frames, clip_frames)
    return np.linspace(0, frames - 1, clip_frames).astype(np.int64)


def _looped(frames: int, clip_frames: int) -> Indices:
    return np.arange(clip_frames, dtype=np.int64) % frames
