"""Datasets for tests: a few small videos written through `Store`, and the real faces where there are any."""

import os
from pathlib import Path

import numpy as np
import pytest

from qafe.store import CsvRow, Store

SIDE = 64


def video_frames(seed: int, frames: int, side: int = SIDE) -> np.ndarray:
    """Smooth frames that differ from each other, uint8 [T,H,W,3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (frames, side // 16, side // 16, 3), np.uint8)
    return coarse.repeat(16, axis=1).repeat(16, axis=2)


def video_landmarks(seed: int, frames: int, side: int = SIDE) -> np.ndarray:
    """106 points well inside the frame, float32 [T,106,2]."""
    return np.random.default_rng(seed).uniform(side * 0.2, side * 0.8, (frames, 106, 2)).astype(np.float32)


def write_cohort(root: Path, patients: int = 6, frames: int = 12) -> Store:
    """Patients P1, P2, ... with a smile and a frown each; the last two are the test patients."""
    store = Store.create(root)
    rows: list[CsvRow] = []
    for patient in range(1, patients + 1):
        for kind, expression in enumerate(("smile", "frown")):
            video = f"clip{patient:02d}{expression}"
            store.write_video(
                f"P{patient}", video, video_frames(10 * patient + kind, frames), video_landmarks(patient, frames)
            )
            rows.append(CsvRow(f"{video}_P{patient}", float(patient % 5), frames, expression))
    store.write_csv("train", rows[:-4], "own")
    store.write_csv("test", rows[-4:], "own")
    return store


def real_faces() -> Path:
    """The folder of real clips (QAFE_REAL_FACES, or ../shared/real_faces); skips the test where there is none."""
    default = Path(__file__).parents[3] / "shared" / "real_faces"
    path = Path(os.environ.get("QAFE_REAL_FACES", default))
    if not (path / "prepared").is_dir():
        pytest.skip(f"the real face clips are not at {path} (QAFE_REAL_FACES)")
    return path
