"""Freed memory is kept inside the block and given back after it."""

import ctypes
import resource
import sys

import pytest
import torch

from qafe import memory
from qafe.memory import freed_memory_kept

HAS_GLIBC = sys.platform == "linux" and memory._glibc() is not None


def faults(rounds: int = 3) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(64 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not HAS_GLIBC, reason="the C library is not glibc")
def test_a_freed_block_is_used_again_without_page_faults() -> None:
    libc = ctypes.CDLL(None)
    assert libc.gnu_get_libc_version
    outside = faults()
    with freed_memory_kept():
        with freed_memory_kept():
            faults(40)  # Until a hole is there that such a block fits into with its alignment.
        inside = faults()
    assert inside < outside / 10, "the inner block's end must not end the outer one"
    assert faults() > inside + outside / 10


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with freed_memory_kept():
        pass
    assert memory._inside == 0


def test_an_error_inside_the_block_ends_it() -> None:
    with pytest.raises(RuntimeError, match="stop"), freed_memory_kept():
        raise RuntimeError("stop")
    assert memory._inside == 0
