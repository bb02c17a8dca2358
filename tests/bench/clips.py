"""Prepared dataset -> what the model reads: ours against the published loader, in turns, in CPU seconds of one thread.

A pair is one training clip of the preset ``paper``: 80 frames of 224 px and 80 heatmaps of 56 px. Ours reads the frames
from their JPEGs or from the cache, and draws the heatmaps from landmarks; the rival reads the heatmaps' JPEGs, too. It
does in our words what ../shared/reference/REFERENCE.md says that the published loader does, in a process of its own
that has none of our settings; there it took 229 + 62 ms CPU.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

import qafe.predict
import qafe.train
from qafe.config import Config, paper, small
from qafe.data import heatmap
from qafe.data.cohort import load_cohort
from qafe.data.dataset import ClipDataset, collate, model_inputs, resized_px
from qafe.data.frames import RGB_MEAN, RGB_STD, normalised
from qafe.data.loader import read_batches
from qafe.data.manifest import read_manifest
from qafe.data.sample import SampleConfig, make_sample
from qafe.dotted import override
from qafe.memory import freed_memory_kept
from qafe.store import Store

from .rounds import Row

FRAMES = (100, 120)
"""Of a video: more than a clip has, so that all of a clip's frames differ."""
GRAIN = 7.2
"""Noise added to the drawn faces, in levels: with it a JPEG has the 30 kB that the recorded loader read."""
RECORDED_MS = 229 + 62
MADE = "frames normalised, heatmaps drawn"
"""What the profiler calls `model_inputs`."""


def bench(rounds: int, threads: int) -> list[Row]:
    """Three rows: a pair from JPEGs, a pair from the cache, and how long a training waits for clips and evaluates."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        store = _long_videos(Path(name) / "long")
        rows = _pairs(store, rounds)
        sample = make_sample(Path(name) / "sample", SampleConfig(train_patients=8, test_patients=2, clips=2))
        torch.set_num_threads(threads)
        rows.append(_training(sample, epochs=3))
    return rows


def _long_videos(folder: Path) -> Store:
    """Videos longer than a clip, with grain, and their heatmaps as the authors render them."""
    store = Store(
        make_sample(folder, SampleConfig(train_patients=4, test_patients=1, clips=1, frames=FRAMES), workers=1)
    )
    rng = np.random.default_rng(0)
    settings = paper().data.heatmap
    for sample in read_manifest(store).train[:4]:
        whole = store.read_frames(sample.patient, sample.video, range(sample.frames), 256)
        points = store.read_landmarks(sample.patient, sample.video)
        assert points is not None
        grain = rng.normal(0, GRAIN, whole.shape)
        store.write_video(sample.patient, sample.video, np.clip(whole + grain, 0, 255).astype(np.uint8), points)
        maps = heatmap.colourise(heatmap.draw(torch.from_numpy(points[:, 33:]), settings))
        out = folder / "landmarks_heatmap" / sample.patient / sample.video
        out.mkdir(parents=True)
        for number, picture in enumerate((maps * 255).byte().permute(0, 2, 3, 1).numpy(), start=1):
            cv2.imwrite(str(out / f"img_{number:05d}.jpg"), picture)
    return store


def _pairs(store: Store, rounds: int) -> list[Row]:
    samples = read_manifest(store).train[:4]
    config = override(paper(), {"data.repeats": rounds + 1})
    jpeg = override(config, {"data.cache_gb": 0})
    from_jpeg, from_cache = (ClipDataset(store, samples, settings, train=True) for settings in (jpeg, config))
    for index in range(len(samples)):
        from_cache[index]  # builds
    folders = [(_folder(store, "frames", s), _folder(store, "landmarks_heatmap", s)) for s in samples]
    with _plain_process() as process, freed_memory_kept():  # as a training does
        rows = []
        for what, dataset in (("from JPEG", from_jpeg), ("from the cache", from_cache)):
            row = Row(f"clip pair {what}", "clip, CPU", [], [])
            for number in range(rounds + 1):
                place = number % len(samples)
                ours = _cpu_s(partial(_ours, dataset, number, config))
                rival = process.apply(_cpu_s, (partial(_published, *folders[place], seed=number),))
                if number:
                    row.ours.append(ours)
                    row.rival.append(rival)
            row.notes.append(f"recorded for the published loader: {RECORDED_MS} ms")
            rows.append(row)
        rows[1].notes.append(_parts(from_cache, config, rounds))
    jpegs = [path.stat().st_size for path in folders[0][0].iterdir()]
    rows[0].notes.append(f"{statistics.mean(jpegs) / 1e3:.0f} kB a frame")
    return rows


def _plain_process() -> Any:
    """One process with torch's own allocation and one thread."""
    return multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,))


def _folder(store: Store, kind: str, sample: Any) -> Path:
    return store.root / kind / sample.patient / sample.video


def _cpu_s(call: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def _ours(dataset: ClipDataset, index: int, config: Config) -> None:
    model_inputs(collate([dataset[index]]), config)


def _parts(dataset: ClipDataset, config: Config, rounds: int) -> str:
    batch = collate([dataset[0]])
    assert batch.points is not None
    resized = resized_px(config.model.heatmap.size_px, config.data.augment)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: collate([dataset[0]]),
        "crop and normalise": lambda: normalised(batch.frames),
        "draw heatmaps": lambda: heatmap.render(batch.points, config.data.heatmap, resize_px=resized),
    }
    times = {name: statistics.median(_cpu_s(call) for _ in range(rounds)) for name, call in calls.items()}
    return ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())


def _published(frames: Path, heatmaps: Path, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = sorted(path.name for path in frames.iterdir())
    start = int(rng.integers(0, len(names) - 80))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (RGB_MEAN, RGB_STD))
    for folder, resized, side, normalise in ((frames, 256, 224, True), (heatmaps, 64, 56, False)):
        flip, (top, left) = bool(rng.integers(2)), rng.integers(0, resized - side, 2).tolist()
        clip = []
        for name in names[start : start + 80]:
            picture = Image.open(folder / name).convert("RGB")
            if picture.size != (resized, resized):
                picture = picture.resize((resized, resized), Image.Resampling.BILINEAR)
            picture = picture.crop((left, top, left + side, top + side))
            if flip:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
            clip.append(frame.sub_(mean).div_(std) if normalise else frame)
        torch.stack(clip, dim=1)


def _training(sample: Path, epochs: int) -> Row:
    """Seconds of each epoch after the first that the training waits for its next batch, against all its seconds; in
    notes those of its evaluation, and what torch's profiler says of one more epoch."""
    config = override(small(), {"train.epochs": epochs + 1})
    part = load_cohort(sample, config.data).only("smile")
    waited = evaluated = 0.0

    def timed(loader: Any) -> Iterator[Any]:
        nonlocal waited
        batches = read_batches(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def named(batch: Any, config: Config) -> Any:
        with record_function(MADE):
            return model_inputs(batch, config)

    row = Row("small training waits for clips", "epoch", [], [], rival_name="wall")
    qafe.train.read_batches = qafe.predict.read_batches = timed
    qafe.train.model_inputs = qafe.predict.model_inputs = named
    try:
        training = qafe.train.fit(config, part.store, part.train, part.validation, device=torch.device("cpu"))
        for result in islice(training, epochs):
            if result.epoch == 1:
                row.notes.append(f"first epoch, which fills the cache: {waited / result.seconds:.2%} of the wall")
            else:
                row.ours.append(waited)
                row.rival.append(result.seconds)
                evaluated += result.evaluation_s
            waited = 0.0
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = next(training)
    finally:
        qafe.train.read_batches = qafe.predict.read_batches = read_batches
        qafe.train.model_inputs = qafe.predict.model_inputs = model_inputs
    row.notes.append(f"later epochs: {sum(row.ours) / sum(row.rival):.2%} of the wall, data.workers=0")
    shares = {
        name: sum(event.cpu_time_total for event in seen.key_averages() if event.key.startswith(start)) / 1e6
        for name, start in (("loader", "enumerate(DataLoader)"), ("frames and heatmaps made", MADE))
    }
    told = ", ".join(f"{name} {seconds / result.seconds:.2%}" for name, seconds in shares.items())
    row.notes.append(f"torch.profiler, of one more epoch's wall: {told}")
    counts = f"{len(part.validation)} validation clips, after {len(part.train) * config.data.repeats} training clips"
    row.notes.append(f"evaluation once per epoch: {evaluated / sum(row.rival):.1%} of the wall ({counts})")
    return row
