"""What the authors' own code took where it was run, for who does not have it; and a kernel that says how fast this
machine is."""

from __future__ import annotations

import statistics
import time

from .rounds import Row

SOURCE = (
    "the authors' own code (shuchaoduan/QAFE-Net@9afdd314) on 2 virtual processors of an AMD EPYC with AVX-512, "
    "2 threads, torch 2.13.0, in another run: ../shared/reference/bench_reference.json"
)
RECORDED: tuple[tuple[str, str, float], ...] = (
    ("heatmaps, 256 px JET, uint8", "", 0.785),
    ("clip pair", "", 0.292),
    ("training step", "batch 1, paper", 18.5),
    ("inference", "paper", 7.41),
    ("peak memory", "batch 1, paper", 5.5),
)
"""How a row's name begins and ends; median CPU-seconds of all threads, or GB. Heatmaps: of a clip of 80 frames; clip
pair: of 80 frames and 80 rendered heatmaps, read and transformed, one after the other."""
KERNEL_GFLOP = (8 * 2 * 16 * 56 * 56 * 64 * 64 * 9 + 8 * 2 * 1024**3) / 1e9


def attach(rows: list[Row]) -> None:
    """Gives each row the recorded number that belongs to it."""
    for row in rows:
        for start, end, value in RECORDED:
            if row.what.startswith(start) and row.what.endswith(end):
                row.recorded = value


def kernel_cpu_s(rounds: int = 3) -> float:
    """CPU-seconds of the calibration kernel: 3x3 convolutions of [16,64,56,56] and products of 1024 x 1024 matrices,
    eight of each, float32, one thread: two would spin for each other beside other processes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, weight = torch.ones(16, 64, 56, 56), torch.ones(64, 64, 3, 3)
    matrix = torch.ones(1024, 1024)
    times = []
    with torch.inference_mode():
        for number in range(rounds + 1):
            start = time.process_time()
            for _ in range(8):
                torch.nn.functional.conv2d(x, weight, padding=1)
                matrix @ matrix
            if number:
                times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return statistics.median(times)


def sentence(kernel_s: float) -> str:
    """What the recorded column is, and is not."""
    return (
        f"recorded: CPU-seconds of {SOURCE}. They are not scaled to this machine, for the calibration kernel was not "
        f"timed there; here its {KERNEL_GFLOP:.0f} GFLOP take {kernel_s:.2f} CPU-s (one thread, "
        f"{KERNEL_GFLOP / kernel_s:.0f} GFLOP a CPU-s; the recorded training step did {1049 / 18.5:.0f})."
    )
