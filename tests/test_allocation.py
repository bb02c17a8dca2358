"""What of a machine is ours: affinity masks, and cgroups of both versions as files of our own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qafe import allocation
from qafe.allocation import Memory, cores, memory
from qafe.device import use_own_cores
from qafe.errors import ConfigError

MB = 2**20
Files = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Makes a machine with 64 cores and 8000 of 16000 MB free, from /proc/self/cgroup and files of /sys/fs/cgroup."""
    monkeypatch.setattr(allocation, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(allocation, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(allocation, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "meminfo").write_text(f"MemTotal: {16000 * 1024} kB\nMemAvailable: {8000 * 1024} kB\n")

    def make(own: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(own)
        for name, text in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(text)

    return make


NEW = "0::/jobs/one\n"
OLD = "4:memory:/jobs/one\n3:cpu,cpuacct:/jobs/one\n0::/\n"
QUOTA = "cpu.cfs_quota_us"
PERIOD = "cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (NEW, {}, 64),
        (NEW, {"jobs/one/cpu.max": "max 100000\n"}, 64),
        (NEW, {"jobs/one/cpu.max": "100000 100000\n"}, 1),
        (NEW, {"jobs/one/cpu.max": "250000 100000\n"}, 2),
        (NEW, {"jobs/one/cpu.max": "50000 100000\n"}, 1),
        (NEW, {"jobs/one/cpu.max": "max 100000\n", "jobs/cpu.max": "400000 100000\n"}, 4),  # of a group above
        ("0::/a/name/of/the/host\n", {"cpu.max": "300000 100000\n"}, 3),  # a container: its own group is the root
        (OLD, {f"cpu/jobs/one/{QUOTA}": "-1\n", f"cpu/jobs/one/{PERIOD}": "100000\n"}, 64),
        (OLD, {f"cpu/jobs/one/{QUOTA}": "800000\n", f"cpu/jobs/one/{PERIOD}": "100000\n"}, 8),
        (OLD, {f"cpu,cpuacct/jobs/{QUOTA}": "200000\n", f"cpu,cpuacct/jobs/{PERIOD}": "100000\n"}, 2),
    ],
)
def test_a_quota_counts(own: str, files: dict[str, str], expected: int, machine: Files) -> None:
    machine(own, files)
    assert cores() == expected


def test_the_smaller_of_mask_and_quota(machine: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(NEW, {"jobs/one/cpu.max": "400000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7})
    assert cores() == 2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        use_own_cores()
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        use_own_cores()
        assert torch.get_num_threads() == 1, "fewer stay as they are"
    finally:
        torch.set_num_threads(threads)


def test_taskset_is_heard() -> None:
    core = str(min(os.sched_getaffinity(0)))
    line = ["taskset", "-c", core, sys.executable, "-c", "from qafe.allocation import cores; print(cores())"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout == "1\n"


def of_new(limit: str, used: int = 900, cached: int = 400) -> dict[str, str]:
    return {
        "jobs/memory.max": limit,
        "jobs/memory.current": str(used * MB),
        "jobs/memory.stat": f"anon 5\ninactive_file {cached * MB}",
    }


def of_old(limit: int) -> dict[str, str]:
    return {
        "memory/jobs/one/memory.limit_in_bytes": str(limit),
        "memory/jobs/one/memory.usage_in_bytes": str(900 * MB),
        "memory/jobs/one/memory.stat": f"total_inactive_file {400 * MB}\ninactive_file 7",
    }


@pytest.mark.parametrize(
    ("own", "files", "total_mb", "free_mb"),
    [
        (NEW, of_new("max"), 16000, 8000),
        (NEW, of_new(str(3000 * MB)), 3000, 2500),
        (NEW, of_new(str(3000 * MB), used=3500), 3000, 0),
        (OLD, of_old(2**63 - 4096), 16000, 8000),
        (OLD, of_old(3000 * MB), 3000, 2500),
    ],
)
def test_the_limit_of_a_container_counts(
    own: str, files: dict[str, str], total_mb: int, free_mb: int, machine: Files
) -> None:
    machine(own, files)
    assert memory() == Memory(total=total_mb * MB, free=free_mb * MB)


def test_a_system_without_cgroups(machine: Files, tmp_path: Path) -> None:
    machine("", {})
    (tmp_path / "cgroup").unlink()
    assert cores() == 64
    assert memory() == Memory(total=16000 * MB, free=8000 * MB)


def test_a_system_that_does_not_say_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "MEMINFO", tmp_path / "none")
    with pytest.raises(ConfigError, match="free memory is read from"):
        memory()


def test_nobody_asks_the_whole_machine() -> None:
    root = Path(__file__).parents[1]
    asked = ("os.cpu_count(", "psutil.virtual_memory(", "psutil.cpu_count(", "cuda.device_count(", "MemAvailable")
    files = [path for room in ("qafe", "sweeps", "tracking") for path in (root / room).rglob("*.py")]
    assert len(files) > 100
    found = {path.name for path in files if any(words in path.read_text() for words in asked)}
    assert found == {"allocation.py"}
