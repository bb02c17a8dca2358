"""What a trial says of its machine."""

from types import SimpleNamespace

import pytest

from qafe.allocation import Memory
from sweeps.monitor import Monitor, monitor


def test_means_have_the_names_of_mlflows_own_page() -> None:
    found = Monitor()
    found.look()
    means = found.take()
    assert set(means) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
    }
    assert 0 <= means["system/cpu_utilization_percentage"] <= 100
    assert means["system/system_memory_usage_megabytes"] > 10
    assert set(found.take()) == set(means)  # there is always one look


def test_what_is_taken_is_a_mean_of_all_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Monitor()
    free = iter((900, 800, 400))
    monkeypatch.setattr("qafe.allocation.memory", lambda: Memory(total=1000, free=next(free)))
    found.look()
    found.look()
    assert found.take()["system/system_memory_usage_percentage"] == 15.0
    found.look()
    assert found.take()["system/system_memory_usage_percentage"] == 60.0


def test_only_our_own_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda percpu: [0.0, 80.0, 40.0, 0.0])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 2})
    assert Monitor().take()["system/cpu_utilization_percentage"] == 60.0


class FakeNvml:
    """Two GPUs of NVIDIA's library."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu-{index}"

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        return name

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=4e9 if handle == "gpu-1" else 2e9, total=8e9)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=90 if handle == "gpu-1" else 30)


def test_only_the_trials_own_gpus_are_looked_at() -> None:
    means = Monitor(FakeNvml(), ("1", "GPU-0a1b")).take()
    assert means["system/gpu_0_utilization_percentage"] == 90
    assert means["system/gpu_0_memory_usage_megabytes"] == 4000
    assert means["system/gpu_1_utilization_percentage"] == 30
    assert means["system/gpu_1_memory_usage_percentage"] == 25
    assert not any("gpu_2" in name for name in means)


def test_a_process_has_one_monitor() -> None:
    assert monitor() is monitor()
