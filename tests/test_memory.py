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


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with freed_memory_kept():
        pass
    assert memory._inside == 0


def test_an_error_inside_the_block_ends_it() -> None:
    with pytest.raises(RuntimeError, match="stop"), freed_memory_kept():
        raise RuntimeError("stop")
    assert memory._inside == 0
