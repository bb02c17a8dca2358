"""What of this machine is ours: cores, memory and GPUs.

Within what limits a process: its affinity mask (``taskset``, Slurm), its cgroups and those above them (containers,
Slurm, systemd; both versions), and ``CUDA_VISIBLE_DEVICES``. `os.cpu_count` and the like tell of the whole machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
NO_LIMIT = 2**63


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that are ours.

    Attributes:
        total: what processes may hold together.
        free: what new processes could have now; files that the kernel can drop count as free.
    """

    total: int
    free: int


def cores() -> int:
    """Cores that are ours; of a quota the whole ones, at least one."""
    return max(1, min(len(os.sched_getaffinity(0)), int(min(_quotas(), default=NO_LIMIT))))


def gpus() -> int:
    """GPUs that are ours, and that torch can use."""
    import torch  # late: most commands need none

    return torch.cuda.device_count()


def memory() -> Memory:
    """Memory that is ours.

    Raises:
        ConfigError: the system does not say (it is not Linux).
    """
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError) as err:
        raise ConfigError(f"free memory is read from {MEMINFO}, which is not there ({type(err).__name__}).") from err
    for limit, used in _memory_limits():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return Memory(total=total, free=free)


def _quotas() -> Iterator[float]:
    """Cores' worth of time that each cgroup allows."""
    for new, folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if new:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, in use) of each cgroup that has a limit."""
    for new, folder in _groups("memory"):
        names = ("memory.max", "memory.current", "inactive_file")
        if not new:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit_file, usage_file, cached = names
        with contextlib.suppress(OSError, ValueError):
            limit = (folder / limit_file).read_text().strip()
            if limit != "max":
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int(limit), int((folder / usage_file).read_text()) - int(counts.get(cached, 0))


def _groups(controller: str) -> Iterator[tuple[bool, Path]]:
    """(whether it is of cgroups' second version, folder) of this process's groups for a controller, and of those above
    them."""
    try:
        lines = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:  # a system without cgroups
        return
    for _, controllers, path in lines:
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS
        if controllers:
            root /= controller if (CGROUPS / controller).is_dir() else controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a container sees its own group as the root, under any name
            if not folder.is_relative_to(root):
                break
            yield not controllers, folder
