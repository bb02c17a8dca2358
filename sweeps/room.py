"""Whether a trial fits in the memory that it gets, found before it starts."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from qafe import allocation, dotted
from qafe.config import Config
from qafe.footprint import Estimate, resident_bytes, training_memory

FREE_SHARE = 0.1
"""Of the memory that a trial gets, kept for what the estimate does not see: the GPU's context (some 0.5 GB), scratch
space of convolutions, the allocator's rounding. A trial that is let in by mistake still halves its batch when memory
runs out; one that is refused by mistake is lost, so the margin is no larger."""
CPU_PROCESS_BYTES = 500 * 2**20
"""Python with torch, Ray and OpenCV, before the first tensor (measured)."""
HEAP_FACTOR = 1.7
"""Heap of a CPU training over its live tensors, where `qafe.memory` keeps what is freed: holes, and what oneDNN
reorders (measured: 1.64 small, 1.70 paper; see tests/test_footprint.py)."""
CHECKPOINTED_HEAP_FACTOR = 1.45
RAYS_UNIT = 1e-4
"""Ray counts resources in steps of this."""
SAFE_FACTOR = 4
"""A trial is looked at closely where it would not fit with this many times the baseline's memory a clip: what the
studies search (fusions, heatmap sizes) changes it less, and the look takes a second or two."""


def process_bytes(step: Estimate, config: Config, device: torch.device, models: int = 1) -> int:
    """What a trial holds at its fullest, in bytes: on a GPU its tensors, on a CPU the process.

    Args:
        models: expressions that are trained side by side; one at a time has gradients and activations.
    """
    tensors = models * (step.weights + step.optimizer) + step.gradients + step.activations
    if device.type != "cpu":
        return tensors
    return int(CPU_PROCESS_BYTES + tensors * (CHECKPOINTED_HEAP_FACTOR if config.train.checkpoint else HEAP_FACTOR))


@functools.lru_cache(maxsize=16)
def trial_bytes(config: Config, device: torch.device, models: int = 1) -> int:
    """`process_bytes` of a config's training step."""
    return process_bytes(training_memory(config, device), config, device, models)


def side_by_side(cpus: float, gpus: float, cpus_per_trial: float, gpus_per_trial: float) -> int:
    """How many trials a machine with so many CPUs and GPUs has room for at once; a part of a GPU is of one GPU."""
    places = int(cpus / cpus_per_trial + RAYS_UNIT)
    if gpus_per_trial > 0:
        of_one = int(1 / gpus_per_trial + RAYS_UNIT)
        places = min(places, int(gpus) * of_one if gpus_per_trial < 1 else int(gpus / gpus_per_trial))
    return places


def room_bytes(device: torch.device, gpus_per_trial: float, neighbours: int) -> int:
    """Memory that one trial may count on, in bytes: its share of the whole GPU, or of the machine's free memory.

    What the processes of the same parent hold (Ray's workers: the trials that run already) counts as free, so that
    the share does not depend on who came first.

    Args:
        neighbours: trials that this machine runs at once, this one included.
    """
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory * min(gpus_per_trial, 1.0)
    else:
        whole = (allocation.memory().free + sum(map(resident_bytes, _siblings()))) / neighbours
    return int(whole * (1 - FREE_SHARE))


def _siblings() -> Iterator[int]:
    """Processes of this one's parent that are Ray's workers, this one included where it is one."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getppid() and (folder / "cmdline").read_bytes().startswith(b"ray::"):
                yield int(folder.name)
        except (OSError, ValueError, IndexError):
            continue


def fitting(config: Config, device: torch.device, room: int, models: int = 1) -> Config:
    """The config, with a smaller batch of the same steps if only that fits into so many bytes.

    Raises:
        MemoryError: not even a batch of one clip fits.
    """
    planned = needed = trial_bytes(config, device, models)
    smaller = config
    while needed > room:
        half = with_half_the_batch(smaller)
        if half is None:
            raise MemoryError(
                f"a batch of {smaller.train.batch_size} would need {needed / 2**30:.1f} GiB and a trial has "
                f"{room / 2**30:.1f} GiB of this {'machine' if device.type == 'cpu' else 'GPU'} "
                f"(batches of {config.train.batch_size}: {planned / 2**30:.1f} GiB). Set train.checkpoint=true or a "
                "smaller preset, or run fewer trials side by side."
            )
        smaller = half
        needed = trial_bytes(smaller, device, models)
    return smaller


def surely_fits(config: Config, baseline: Config, baseline_bytes: int, room: int) -> bool:
    """Whether a trial need not be looked at closely; see `SAFE_FACTOR`."""
    larger = max(1.0, config.train.batch_size / baseline.train.batch_size)
    return 0 < SAFE_FACTOR * baseline_bytes * larger <= room


def with_half_the_batch(config: Config) -> Config | None:
    """The same steps of the same clips in smaller batches, or None if they cannot be smaller."""
    batch, step = config.train.batch_size, config.train.batch_size * config.train.accumulate
    if batch == 1:
        return None
    smaller = max(size for size in range(1, batch // 2 + 1) if step % size == 0)
    return dotted.override(config, {"train.batch_size": smaller, "train.accumulate": step // smaller})
