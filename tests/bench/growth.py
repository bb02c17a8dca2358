"""How cost grows: with the length of a clip, the batch, the number of clips, and the loader's workers.

All seconds are CPU-seconds of one thread, but for the workers' panel, which is wall-clock time. An exponent of 1 says
that twice as much takes twice as long.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils import benchmark

from qafe.config import PRESETS, Config, paper
from qafe.data import heatmap
from qafe.data.dataset import ClipDataset, collate, model_inputs
from qafe.data.loader import clip_loader
from qafe.data.manifest import Sample
from qafe.dotted import override
from qafe.memory import freed_memory_kept
from qafe.store import Store

from .heatmaps import landmarks
from .step import Measurement, make_step

AXES = {
    "clip length": "frames in a clip",
    "batch": "clips in a batch",
    "clips": "clips in an epoch",
    "workers": "loader workers",
}
"""The panels: what is varied, and its unit."""
NO_SETTINGS: dict[str, Any] = {}


@dataclass
class Series:
    """The cost of one thing at several sizes."""

    what: str
    axis: str
    """One of `AXES`."""
    unit: str
    """What the seconds are for."""
    at: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def slope(self) -> float:
        """The exponent of growth (least squares in logarithms); for workers seconds per further worker."""
        x, y = np.array(self.at, float), np.array(self.seconds)
        if self.axis != "workers":
            x, y = np.log(x), np.log(y)
        return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else math.nan

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return asdict(self) | {"slope": self.slope, "slope_is": "s/worker" if self.axis == "workers" else "exponent"}


def bench(
    *,
    preset: str = "small",
    clip_preset: str = "paper",
    frames: Sequence[int] = (16, 32, 80, 160, 320),
    batches: Sequence[int] = (1, 2, 4),
    clips: Sequence[int] = (2, 4, 8, 16),
    workers: Sequence[int] = (0, 1, 2),
    min_run_s: float = 0.5,
) -> list[Series]:
    """All series.

    Args:
        preset: of the training step.
        clip_preset: of the clips that are read; heatmaps alone are drawn as in ``paper``.
        frames: of a clip: multiples of 16.
        min_run_s: a measurement is repeated for at least so long.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    clip = override(PRESETS[clip_preset](), {"data.repeats": 1, "data.workers": 0})
    with tempfile.TemporaryDirectory() as name, freed_memory_kept():  # As a training does.
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        try:
            store = Store.create(Path(name) / "data")
            long = _video(store, "long", max(frames) + 16)
            short = [_video(store, f"v{number:03d}", 100) for number in range(max(clips))]
            return [
                *_lengths(store, long, clip, preset, frames, min_run_s),
                *_batches(store, short, clip, preset, batches, min_run_s),
                *_clips(store, short, clip, clips, min_run_s),
                *_workers(store, short[:8], clip, workers),
            ]
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def figure(series: Sequence[Series], path: Path) -> None:
    """One panel for each axis: logarithmic, but for the workers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 8), layout="constrained")
    for axes, (axis, label) in zip(picture.subplots(2, 2).flat, AXES.items(), strict=True):
        for one in series:
            if one.axis == axis:
                slope = f"{one.slope:+.3f} s/worker" if axis == "workers" else f"exponent {one.slope:.2f}"
                axes.plot(one.at, one.seconds, "o-", label=f"{one.what}: {slope}")
        if axis == "workers":
            axes.set_ylim(bottom=0)
        else:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        shown = sorted({at for one in series if one.axis == axis for at in one.at})
        axes.set_xticks(shown, [str(at) for at in shown])
        axes.set_xlabel(label)
        axes.set_ylabel("seconds" if axis == "workers" else "CPU-seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    FigureCanvasAgg(picture)
    picture.savefig(path, dpi=120)


def _lengths(
    store: Store, video: Sample, clip: Config, preset: str, frames: Sequence[int], min_run_s: float
) -> list[Series]:
    drawn = Series("heatmaps, 256 px JET -> 64 px", "clip length", "clip")
    read = Series("clip pair from the cache", "clip length", "clip")
    trained = Series(f"training step, {preset}", "clip length", "clip")
    points = torch.from_numpy(landmarks()).repeat(math.ceil(max(frames) / 80), 1, 1)
    for count in frames:
        _add(drawn, count, partial(_draw, points[:count]), min_run_s)
        dataset, config = _dataset(
            store, [video], override(clip, {"model.segments": count // clip.model.segment_frames})
        )
        _add(read, count, partial(_read, dataset, config), min_run_s)
        _add(trained, count, _step(preset, 1, count), min_run_s)
    return [drawn, read, trained]


def _batches(
    store: Store, videos: Sequence[Sample], clip: Config, preset: str, batches: Sequence[int], min_run_s: float
) -> list[Series]:
    drawn = Series("heatmaps, 256 px JET -> 64 px", "batch", "batch")
    read = Series("clip pairs from the cache", "batch", "batch")
    trained = Series(f"training step, {preset}", "batch", "batch")
    points = torch.from_numpy(landmarks())
    for count in batches:
        batch = points.expand(count, *points.shape).contiguous()
        _add(drawn, count, partial(_draw, batch), min_run_s)
        dataset, config = _dataset(store, [videos[index % len(videos)] for index in range(count)], clip)
        _add(read, count, partial(_read, dataset, config), min_run_s)
        _add(trained, count, _step(preset, count, None), min_run_s)
    return [drawn, read, trained]


def _clips(
    store: Store, videos: Sequence[Sample], clip: Config, clips: Sequence[int], min_run_s: float
) -> list[Series]:
    cached = Series("an epoch's loading, from the cache", "clips", "epoch")
    jpeg = Series("an epoch's loading, from JPEG", "clips", "epoch")
    for series, settings in ((cached, NO_SETTINGS), (jpeg, {"data.cache_gb": 0})):
        for count in clips:
            dataset, config = _dataset(store, videos[:count], override(clip, settings))
            _add(series, count, partial(_epoch, dataset, config), min_run_s)
    return [cached, jpeg]


def _workers(store: Store, videos: Sequence[Sample], clip: Config, workers: Sequence[int]) -> list[Series]:
    cached = Series(f"{len(videos)} clips, from the cache", "workers", "epoch")
    jpeg = Series(f"{len(videos)} clips, from JPEG", "workers", "epoch")
    for series, settings in ((cached, NO_SETTINGS), (jpeg, {"data.cache_gb": 0})):
        for count in workers:
            dataset, config = _dataset(store, videos, override(clip, settings | {"data.workers": count}))
            loader = clip_loader(dataset, _order(dataset, config), config, torch.device("cpu"))
            times = []
            for number in range(3):  # The first pass starts the workers.
                start = time.perf_counter()
                for batch in loader:
                    model_inputs(batch, config)
                if number:
                    times.append(time.perf_counter() - start)
            series.at.append(count)
            series.seconds.append(statistics.median(times))
    return [cached, jpeg]


def _add(series: Series, at: int, call: Callable[[], object], min_run_s: float) -> None:
    timer = benchmark.Timer("call()", globals={"call": call}, timer=time.process_time, num_threads=1)
    series.at.append(at)
    # Its first call, from which it estimates how many there shall be, does not count.
    series.seconds.append(timer.blocked_autorange(min_run_time=min_run_s).median)


def _draw(points: torch.Tensor) -> None:
    settings = paper().data.heatmap
    heatmap.render(points, settings, resize_px=64)


def _step(preset: str, clips: int, frames: int | None) -> Callable[[], None]:
    config = PRESETS[preset]()
    if frames is not None:
        config = override(config, {"model.segments": frames // config.model.segment_frames})
    return make_step(config, Measurement(preset, "train", "fp32", clips, 1))


def _dataset(store: Store, videos: Sequence[Sample], config: Config) -> tuple[ClipDataset, Config]:
    return ClipDataset(store, videos, config, train=True), config


def _read(dataset: ClipDataset, config: Config) -> None:
    model_inputs(collate([dataset[index] for index in range(len(dataset))]), config)


def _order(dataset: ClipDataset, config: Config) -> list[list[int]]:
    size = config.train.batch_size
    return [list(range(start, min(start + size, len(dataset)))) for start in range(0, len(dataset), size)]


def _epoch(dataset: ClipDataset, config: Config) -> None:
    for batch in _order(dataset, config):
        model_inputs(collate([dataset[index] for index in batch]), config)


def _video(store: Store, name: str, frames: int) -> Sample:
    """A video of soft noise that moves, with grain: its JPEGs have about the 30 kB of PFED5's."""
    rng = np.random.default_rng(len(name) * frames)
    soft = cv2.resize(rng.uniform(40, 215, (24, 24, 3)), (512, 512), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 4, (512, 512, 3))
    shifts = np.arange(frames) % 128
    pictures = np.stack(
        [
            np.clip(soft[at : at + 256, at : at + 256] + grain[-at - 256 : 512 - at, :256], 0, 255).astype(np.uint8)
            for at in shifts
        ]
    )
    points = np.resize(landmarks(), (frames, 72, 2))
    points = np.concatenate([points, points[:, :1]], axis=1)
    store.write_video("P01", name, pictures, points)
    return Sample(f"{name}_P01", "P01", name, "smile", 0.0, frames)
