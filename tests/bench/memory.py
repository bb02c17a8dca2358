"""A training step whose memory is kept for the next one, against one whose memory goes back to the system.

Each has its own process, which stays up for all rounds: what is freed is kept from step to step, as in a training.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from qafe.config import PRESETS
from qafe.memory import freed_memory_kept

from .rounds import Row
from .step import Measurement, make_step

WARM = 3
"""Steps before the first that counts: until then memory has not its final extent."""


def bench(preset: str, rounds: int, threads: int) -> list[Row]:
    """A row for float32 and one for bf16; the sides begin each round in turns."""
    return [_row(preset, how, rounds, threads) for how in ("fp32", "bf16")]


def _row(preset: str, how: str, rounds: int, threads: int) -> Row:
    row = Row(f"training step, {preset}, {how}, {threads} threads", "step", [], [], "memory given back")
    sides = [(_start(preset, how, threads, keep), times) for keep, times in ((True, row.ours), (False, row.rival))]
    for number in range(rounds):
        for process, times in sides[:: 1 if number % 2 else -1]:
            times.append(_one(process))
    for process, _ in sides:
        process.communicate()
    return row


def _start(preset: str, how: str, threads: int, keep: bool) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", __spec__.name, preset, how, str(threads), "keep" if keep else ""]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        line, env=environment, cwd=Path(__file__).parents[2], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    _one(process)
    return process


def _one(process: subprocess.Popen[str]) -> float:
    """Seconds of one more step; the first time, of those before."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _serve(preset: str, how: str, threads: str, keep: str) -> None:
    """Takes a step for each line of stdin and prints its seconds; for the first line those that do not count."""
    import torch

    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    step = make_step(PRESETS[preset](), Measurement(preset, "train", how, 1, int(threads)))
    with freed_memory_kept(bool(keep)):
        steps = WARM
        for _ in sys.stdin:
            started = time.perf_counter()
            for _ in range(steps):
                step()
            steps = 1
            print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
