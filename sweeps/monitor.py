"""What a trial's machine was doing during an epoch, under the names that MLflow's System metrics page looks for.

A thread of the worker looks every few seconds; the trial takes the means with each epoch. Of cores and memory those
count that are ours (`qafe.allocation`); of GPUs those are looked at that the trial may use, where NVIDIA's library is
installed (``pip install nvidia-ml-py``).
"""

from __future__ import annotations

import functools
import os
import threading
from collections import defaultdict
from typing import Any

import psutil

from qafe import allocation

LOOK_S = 5.0
MEGABYTE = 1e6
"""As MLflow counts them."""


class Monitor:
    """Means since they were last taken.

    Args:
        nvml: NVIDIA's library (pynvml), or None.
        visible: the GPUs to look at, as in ``CUDA_VISIBLE_DEVICES``.
    """

    def __init__(self, nvml: Any = None, visible: tuple[str, ...] = ()) -> None:
        self._nvml = nvml
        self._gpus = [_handle(nvml, name) for name in visible] if nvml else []
        self._sums: dict[str, float] = defaultdict(float)
        self._looks = 0
        self._lock = threading.Lock()
        psutil.cpu_percent(percpu=True)  # the first answer is of no time at all

    def look(self) -> None:
        """One look at everything."""
        memory, busy = allocation.memory(), psutil.cpu_percent(percpu=True)
        ours = [busy[core] for core in os.sched_getaffinity(0) if core < len(busy)]
        found = {
            "cpu_utilization_percentage": sum(ours) / max(len(ours), 1),
            "system_memory_usage_megabytes": (memory.total - memory.free) / MEGABYTE,
            "system_memory_usage_percentage": 100 * (1 - memory.free / memory.total),
        }
        for number, handle in enumerate(self._gpus):
            held = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            found[f"gpu_{number}_utilization_percentage"] = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            found[f"gpu_{number}_memory_usage_megabytes"] = held.used / MEGABYTE
            found[f"gpu_{number}_memory_usage_percentage"] = 100 * held.used / held.total
        with self._lock:
            self._looks += 1
            for name, value in found.items():
                self._sums[f"system/{name}"] += value

    def take(self) -> dict[str, float]:
        """Means of all looks since the last call; of one look now, where there was none."""
        if not self._looks:
            self.look()
        with self._lock:
            means = {name: round(value / self._looks, 2) for name, value in self._sums.items()}
            self._sums.clear()
            self._looks = 0
        return means


@functools.cache
def monitor() -> Monitor:
    """This process's monitor, which looks by itself from the first call on."""
    visible = tuple(name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name)
    found = Monitor(_nvml() if visible else None, visible)
    threading.Thread(target=_watch, args=(found,), name="system-metrics", daemon=True).start()
    return found


def _watch(found: Monitor) -> None:
    pause = threading.Event()
    while not pause.wait(LOOK_S):
        found.look()


def _nvml() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: its own error class cannot be named then
        return None
    return pynvml


def _handle(nvml: Any, name: str) -> Any:
    """A GPU by its number or its UUID."""
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)
