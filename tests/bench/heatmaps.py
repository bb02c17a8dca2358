"""Landmarks -> heatmap frames: ours against the published generator, on the same landmarks and one thread.

Two rivals. "rewritten" is written here from the description of what the authors' generator computes (they publish no
licence, so nothing of theirs is here): for each point a Gaussian window in float64, divided by its maximum, added as
an image; OpenCV's blur; divided by the maximum; uint8; OpenCV's JET map. It is cheaper than the original. "recorded" is
the CPU time that the original took where it was measured (bench_reference.json), times how much slower this machine
decodes a clip of heatmap JPEGs, timed in turns with ours, than that one did; only where that file is.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from qafe.config import HeatmapConfig
from qafe.data import heatmap
from qafe.memory import freed_memory_kept

from .rounds import Row, compare

FRAMES, SIDE_PX, SMALL_PX = 80, 256, 64


def bench(rounds: int) -> list[Row]:
    """A row for each kind of frame and rival, all per clip of 80 frames; both sides keep memory, as a training does."""
    with freed_memory_kept():
        return _rows(rounds)


def _rows(rounds: int) -> list[Row]:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    clip = landmarks()
    points = torch.from_numpy(clip)
    small = heatmap.to_canvas(points, (SIDE_PX, SIDE_PX), SMALL_PX)
    jet = HeatmapConfig()
    small_jet = replace(jet, canvas_px=SMALL_PX)
    small_grey = replace(small_jet, colour="grey")
    theirs = [published(frame) for frame in clip]

    wrong = (heatmap.pictures(points, jet).numpy() != np.stack(theirs)[..., ::-1]).any(-1)
    exact = f"{int(wrong.sum())} of {wrong.size} pixels differ"
    resized = np.stack([_resized(frame) for frame in theirs]).transpose(0, 3, 1, 2)
    apart = np.abs(heatmap.render(points, jet, resize_px=SMALL_PX).mul(255).numpy() - resized)
    levels = f"{int((apart > 0.5).sum())} of {apart.size} values differ"
    other = "drawn at 64 px; theirs: 256 px JET"

    def generate() -> object:
        return [published(frame) for frame in clip]

    def generate_and_resize() -> object:
        return [_resized(published(frame)) for frame in clip]

    ours: list[tuple[str, Callable[[], object], Callable[[], object], str]] = [
        ("256 px JET, uint8", lambda: heatmap.pictures(points, jet), generate, exact),
        ("64 px grey", lambda: heatmap.render(small, small_grey, resize_px=SMALL_PX), generate, other),
        ("64 px JET", lambda: heatmap.render(small, small_jet, resize_px=SMALL_PX), generate, other),
        ("256 px JET -> 64 px", lambda: heatmap.render(points, jet, resize_px=SMALL_PX), generate_and_resize, levels),
    ]
    rows = []
    for what, call, rival, note in ours:
        row = compare(f"heatmaps, {what}", "clip", call, rival, rounds=rounds)
        rows.append(replace(row, rival_name="rewritten", notes=["rival: rewritten", note]))
    recorded = _recorded()
    if recorded is None:
        return rows
    generator_s, decoding_s = recorded
    files = [cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes() for frame in theirs]
    for what, call, _, _ in ours[:3]:
        row = compare(f"heatmaps, {what}", "clip", call, lambda: _decode(files), rounds=rounds)
        scaled = [generator_s * seconds / decoding_s for seconds in row.rival]
        note = f"rival: recorded {1e3 * generator_s:.0f} ms of CPU, scaled by decoding"
        rows.append(replace(row, rival=scaled, rival_name="recorded", notes=[note]))
    return rows


def landmarks() -> npt.NDArray[np.float32]:
    """[80,72,2]: points spread over a face that fills half of the frame, as in the goldens, that moves and stirs."""
    rng = np.random.default_rng(0)
    face = rng.uniform((60, 68), (196, 200), (72, 2))
    moves = rng.normal(0, 0.4, (FRAMES, 1, 2)).cumsum(axis=0)
    return (face + moves + rng.normal(0, 0.3, (FRAMES, 72, 2))).astype(np.float32)


def published(points: npt.NDArray[np.float32], sigma_px: float = 1, window_px: int = 5) -> npt.NDArray[np.uint8]:
    """[P,2] -> [256,256,3], blue first."""
    total = np.zeros((SIDE_PX, SIDE_PX))
    for x, y in points:
        columns, rows = (np.arange(max(0, int(at - window_px)), min(SIDE_PX, int(at + window_px + 1))) for at in (x, y))
        across, down = np.meshgrid(columns, rows)
        window = np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * sigma_px**2))
        image = np.zeros((SIDE_PX, SIDE_PX))
        image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = window / window.max()
        total += image
    blurred = cv2.GaussianBlur(total, (7, 7), 0)
    return cv2.applyColorMap((255 * (blurred / blurred.max())).astype(np.uint8), cv2.COLORMAP_JET)


def _resized(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[256,256,3], blue first -> [64,64,3], red first."""
    image = Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))
    return np.asarray(image.resize((SMALL_PX, SMALL_PX), Image.Resampling.BILINEAR))


def _decode(files: list[bytes]) -> None:
    for file in files:
        Image.open(io.BytesIO(file)).convert("RGB")


def _recorded() -> tuple[float, float] | None:
    """CPU seconds, where they were recorded, to draw a clip and to decode its JPEGs."""
    default = Path(__file__).parents[3] / "shared" / "reference"
    file = Path(os.environ.get("QAFE_REFERENCE", default)) / "bench_reference.json"
    if not file.is_file():
        return None
    runs: dict[str, Any] = {run["part"]: run for run in json.loads(file.read_text())["runs"]}
    drawing = runs["heatmap"]["ms_per_80_frame_clip"]["cpu_median_ms"]
    return drawing / 1e3, runs["loader"]["part.open_decode_80_heatmap"]["cpu_median_ms"] / 1e3
