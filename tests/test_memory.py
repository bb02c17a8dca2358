"""Freed memory is kept inside the block and given back after it."""

import subprocess
import sys

import pytest

from qafe import memory
from qafe.memory import freed_memory_kept

HAS_GLIBC = sys.platform == "linux" and memory._glibc() is not None


FAULTS = """
import resource, torch
from qafe.memory import freed_memory_kept

def faults(rounds=3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(64 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with freed_memory_kept():
    with freed_memory_kept():
        faults(40)  # Until a hole is there that such a block fits into with its alignment.
    inside = faults()
print(outside, inside, faults())
"""


@pytest.mark.skipif(not HAS_GLIBC, reason="the C library is not glibc")
def test_a_freed_block_is_used_again_without_page_faults() -> None:
    # In a process of its own: what the heap holds already decides what fits where.
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    outside, inside, after = map(int, done.stdout.split())
    assert inside < outside / 10, "the inner block's end must not end the outer one"
    assert after > inside + outside / 10


@pytest.mark.skipif(not HAS_GLIBC, reason="the C library is not glibc")
def test_a_large_block_goes_back_at_once() -> None:
    code = """
import psutil, torch
from qafe.memory import freed_memory_returned

def left_mb():
    before = psutil.Process().memory_info().rss
    blocks = [torch.ones(16 * 2**20 // 4) for _ in range(16)]
    small = [torch.ones(2**18) for _ in range(2)]  # at the heap's end: what is below cannot go back
    del blocks
    return (psutil.Process().memory_info().rss - before) / 2**20, small

left_mb()  # moves glibc's own bound
without, kept = left_mb()
with freed_memory_returned():
    within, kept = left_mb()
print(without, within)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    without, within = map(float, done.stdout.split())
    assert within < 16 < without


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with freed_memory_kept():
        pass
    assert memory._inside == 0


def test_an_error_inside_the_block_ends_it() -> None:
    with pytest.raises(RuntimeError, match="stop"), freed_memory_kept():
        raise RuntimeError("stop")
    assert memory._inside == 0
