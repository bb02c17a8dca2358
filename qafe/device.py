"""Where a model is computed, in what precision, and whether that has the memory."""

from __future__ import annotations

import errno
import re
import resource

import torch

from . import allocation
from .config import TrainConfig
from .distributed import local_rank
from .errors import ConfigError


def pick_device(name: str = "auto") -> torch.device:
    """The device to train on: ``auto`` takes a GPU where there is one.

    Each of the processes that torchrun started takes the GPU of its number.

    Raises:
        ConfigError: the named device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank() is not None:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(f"the device must be auto, cpu or a GPU that exists, got {name!r} (--device).") from err
    return device


def use_own_cores() -> None:
    """Gives torch no more threads than this process has cores: torch knows the affinity mask, but no cgroup's quota."""
    torch.set_num_threads(min(torch.get_num_threads(), allocation.cores()))


def amp_dtype(settings: TrainConfig, device: torch.device) -> torch.dtype | None:
    """What ``train.precision`` means on this device; None is plain float32.

    ``auto`` takes bf16 where that is faster: on a CPU with AMX, where a step of the `paper` preset takes half of the
    time that it takes in float32. With avx512_bf16 alone it takes longer, and with neither ten times as long
    (``python -m tests.bench step``).
    """
    choice = settings.precision
    if choice == "auto":
        if device.type != "cuda":
            return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else None
        return torch.bfloat16 if _computes_bf16(device) else torch.float16
    if choice == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 needs a GPU, got device cpu (train.precision). Set train.precision=bf16 or fp32.")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def _computes_bf16(device: torch.device) -> bool:
    """Whether a GPU has bf16 without emulation; `torch.cuda.is_bf16_supported` asks about the current GPU alone."""
    if torch.version.hip:
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8


def precision_name(dtype: torch.dtype | None) -> str:
    """What `amp_dtype` gave, as ``train.precision`` writes it."""
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this process has held: of a GPU since its statistics were reset, else ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|failed to allocate|"
    r"cuda_?error_?(memory_?allocation|out_?of_?memory)|CUBLAS_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED|"
    r"CUFFT_ALLOC_FAILED|CUSPARSE_STATUS_(ALLOC_FAILED|INSUFFICIENT_RESOURCES)|CUDNN_STATUS_ALLOC_FAILED|"
    r"CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED|"
    r"CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate|unable to find an engine to execute this computation",
    re.IGNORECASE,
)
"""How CUDA, cuBLAS, cuDNN, NCCL and torch itself say it. cuBLAS does not initialise where its own memory is not to be
had, and cuDNN finds no engine where none gets its scratch space: torch says so after it has tried them all."""


def out_of_memory(err: BaseException) -> bool:
    """Whether an error says that the GPU's or the machine's memory is spent."""
    if isinstance(err, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(err, OSError):
        return err.errno == errno.ENOMEM
    return isinstance(err, RuntimeError) and OUT_OF_MEMORY.search(str(err)) is not None


def lost_device(err: BaseException) -> bool:
    """Whether this process can use its GPU no more: an error that CUDA gives again for whatever comes after it."""
    return "CUDA error" in str(err) and "out of memory" not in str(err)
