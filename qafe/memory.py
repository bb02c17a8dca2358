"""Freed memory kept for the next step, instead of handed back to the system and fetched again page by page."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_KEEP = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}
"""glibc's mallopt(3) parameters: no mapping of its own for a large block, and no giving back of the heap's end (-1:
however much of it is free; a backward pass leaves more than the largest number that mallopt takes)."""
_MAPPED_BYTES, _USUAL_BYTES = 8 * 2**20, 32 * 2**20
"""From which size on a block gets a mapping of its own; the second is where glibc's own moving bound comes to rest in
a process with large tensors."""

_lock = threading.Lock()
_inside = 0


@contextmanager
def freed_memory_kept(wanted: bool = True) -> Iterator[None]:
    """Within the block, the C library keeps what is freed; after it, what is free goes back to the system.

    A training step on a CPU allocates and frees some gigabytes of activations. glibc maps each large block anew, so
    that the kernel clears every page again in every step: 490,000 to 830,000 page faults in a float32 step of the
    `paper` preset, one clip, one thread, against 200 to 26,000 within the block. By time a step outside takes, of one
    within (``python -m tests.bench memory``, AMD EPYC with avx512_bf16, 2026-12-01, five rounds, spread in brackets):

    ======================  ===================  ===================
    step                    1 thread             2 threads
    ======================  ===================  ===================
    `paper`, float32        1.25 (1.13 to 1.34)  1.11 (1.02 to 1.42)
    `small`, bf16           1.12 (1.03 to 1.14)  1.08 (1.01 to 1.14)
    ======================  ===================  ===================

    The price is a heap with holes, and more peak memory. (torch's pages of 2 MiB, THP_MEM_ALLOC_ENABLE, make the holes
    larger: blocks on their borders do not fit where others were.) Does nothing where the C library is not glibc.
    Blocks may be nested and may overlap in threads; the last one to end restores.
    """
    global _inside
    libc = _glibc() if wanted else None
    if libc is None:
        yield
        return
    with _lock:
        _inside += 1
        for parameter, value in _KEEP.items():
            libc.mallopt(parameter, value)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for parameter, value in _DEFAULTS.items():
                    libc.mallopt(parameter, value)
                libc.malloc_trim(0)


@contextmanager
def freed_memory_returned(wanted: bool = True) -> Iterator[None]:
    """Within the block, a large block goes back to the system when it is freed, and leaves no hole in the heap.

    For who lacks memory: a checkpointed training step of the `paper` preset holds a third less, and takes longer.
    Does nothing where the C library is not glibc.
    """
    libc = _glibc() if wanted else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_BYTES)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return libc
