"""Heatmaps and training steps on one device, first of all a GPU: clips a second by batch, precision and compilation,
peak memory, and how near a step comes to the floor that the device's own matrix products set.

The rival of heatmaps is the published generator rewritten, which knows CPUs only; that of a training step is the
published computation in plain PyTorch on the same device (see `tests.bench.step`), at the same batch in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from qafe.config import PRESETS, HeatmapConfig
from qafe.data import heatmap
from qafe.device import pick_device
from qafe.model.qafenet import build

from .heatmaps import SIDE_PX, SMALL_PX, landmarks, published
from .rounds import Found, Row
from .step import NO_BF16, Measurement, _has_bf16, make_plain, matmul_tflops

GPU_BATCHES, CPU_BATCHES = (1, 2, 4, 8, 16), (1, 2)


def heatmaps(device_name: str, rounds: int, batches: Sequence[int] = (1, 16), min_run_s: float = 0.5) -> Found:
    """Seconds per clip of 80 frames, from landmarks on the device to frames on the device.

    Raises:
        ConfigError: there is no such device.
    """
    device = pick_device(device_name)
    clip = landmarks()
    theirs = []
    for _ in range(rounds):
        start = time.perf_counter()
        for frame in clip:
            published(frame)
        theirs.append(time.perf_counter() - start)
    jet = HeatmapConfig()
    small = replace(jet, canvas_px=SMALL_PX)
    rows = []
    for what, config, resize_px in (
        ("256 px JET, uint8", jet, None),
        ("64 px grey", replace(small, colour="grey"), SMALL_PX),
        ("64 px JET", small, SMALL_PX),
        ("256 px JET -> 64 px", jet, SMALL_PX),
    ):
        for clips in batches:
            points = heatmap.to_canvas(torch.from_numpy(clip), (SIDE_PX, SIDE_PX), config.canvas_px)
            points = points.expand(clips, *points.shape).contiguous().to(device)

            if resize_px is None:
                call = partial(heatmap.pictures, points, config)
            else:
                call = partial(heatmap.render, points, config, resize_px=resize_px)
            seconds, peak_gb = _timed(call, device, rounds, min_run_s)
            row = Row(f"heatmaps, {what}, {clips} at once, {device.type}", "clip", [s / clips for s in seconds], theirs)
            row.rival_name = "rewritten, CPU"
            row.notes.append(f"{clips / statistics.median(seconds):.0f} clips/s")
            if peak_gb is not None:
                row.notes.append(f"peak {peak_gb:.2f} GB")
            rows.append(row)
    return Found(rows)


def step(
    device_name: str, preset: str, rounds: int, threads: int, batches: Sequence[int] = (), published: Path | None = None
) -> Found:
    """Seconds per clip of a training step, with the floor beside them, and peak memory.

    Args:
        batches: default: 1 to 16 on a GPU, 1 and 2 elsewhere; a batch that does not fit ends its series.
    Raises:
        ConfigError: there is no such device, or the authors' code cannot be run.
    """
    device = pick_device(device_name)
    gpu = device.type == "cuda"
    batches = batches or (GPU_BATCHES if gpu else CPU_BATCHES)
    torch.set_num_threads(threads)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _has_bf16()
    left_out = [] if has_bf16 else ["bf16: this GPU lacks it" if gpu else NO_BF16]
    if not gpu:
        left_out.append("torch.compile: on a GPU only; on a CPU it takes minutes and gains little")
    modes = ["fp32", *(["bf16"] if has_bf16 else []), *(["compile"] if gpu else [])]
    modes += ["bf16-compile"] if gpu and has_bf16 else []
    flop = step_flop(preset)
    tflops = {
        mode: matmul_tflops(device, torch.bfloat16 if mode.startswith("bf16") else torch.float32) for mode in modes
    }
    name = torch.cuda.get_device_name(device) if gpu else "CPU"
    rows, full = [], set()
    for clips in batches:
        seen: dict[str, list[dict[str, float]]] = {mode: [] for mode in ("published", *modes) if mode not in full}
        for _ in range(rounds):
            for mode in list(seen):
                found = Measurement(preset, "train", mode, clips, threads, device_name).in_own_process(published)
                if found:
                    seen[mode].append(found)
                else:
                    left_out.append(f"{mode} from batch {clips} on: the memory of the {name} does not suffice")
                    full.add(mode)
                    del seen[mode]
        rival = seen.pop("published", [])
        for mode, measured in seen.items():
            for what, unit, key, per, quantity in (
                (f"training step {mode}", "clip", "wall_s", clips, "s"),
                (f"peak memory {mode}", "device" if gpu else "process", "peak_gb", 1, "GB"),
            ):
                ours, theirs = ([one[key] / per for one in side] for side in (measured, rival))
                row = Row(f"{what}, batch {clips}, {preset}, {device.type}", unit, ours, theirs, quantity=quantity)
                row.rival_name = "authors' code" if published else "rewritten"
                if quantity == "s":
                    seconds, floor_s = statistics.median(ours), flop / tflops[mode] / 1e12
                    rate = f"{flop / 1e12:.2g} TFLOP at {tflops[mode]:.3g} TFLOP/s of matrix products here"
                    row.notes = [
                        f"{1 / seconds:.2f} clips/s",
                        f"floor {1e3 * floor_s:.1f} ms ({rate}): {floor_s / seconds:.0%} of it reached",
                    ]
                rows.append(row)
    if gpu:
        left_out.append("float32 convolutions are computed in TF32, as torch does by default; so is their floor")
    return Found(rows, left_out)


def step_flop(preset: str) -> float:
    """Floating-point operations of a clip's training step, two a multiply-add, as PyTorch counts them: 1.05e12 for
    ``paper``. Computes nothing (meta tensors)."""
    config = PRESETS[preset]()
    with torch.device("meta"):
        model = build(config)
        make_plain(model)
        frames, channels = config.model.clip_frames, config.data.heatmap.channels
        rgb_px, heatmap_px = config.model.rgb.size_px, config.model.heatmap.size_px
        # Batch norm wants two.
        rgb = torch.empty(2, 3, frames, rgb_px, rgb_px)
        heatmaps = torch.empty(2, channels, frames, heatmap_px, heatmap_px)
        with FlopCounterMode(display=False) as counter:
            model(rgb, heatmaps).sum().backward()
    return float(counter.get_total_flops()) / 2


def _timed(call: object, device: torch.device, rounds: int, min_run_s: float) -> tuple[list[float], float | None]:
    """Median seconds in each round, and a GPU's peak memory in GB."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=1)
    timer.timeit(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timer.blocked_autorange(min_run_time=min_run_s).median for _ in range(rounds)]
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
