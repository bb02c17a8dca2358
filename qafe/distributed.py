"""Several processes that train one model, each with its share of every batch: ``torchrun -m qafe train``.

What a step computes is what one process would compute on the whole batch: `Ranks.gather` gives every process the
predictions of all clips, so that each takes the loss of the whole batch, and the gradients that come from the shares
are summed. Shares may then be uneven or empty, and neither a loss that compares clips nor a loss with parameters of
its own needs a rule for it.

Source: PyTorch's DistributedDataParallel (arXiv:2006.15704), which sums the gradients of one part of the model while
those of the next are computed. Differs: sums, and does not average.
"""

import contextlib
import datetime
import fcntl
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .console import INTERRUPTED, USER_ERROR, let_others_speak
from .errors import ConfigError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(hours=2)
"""How long a process waits for the others: the first one scores the test set and writes files meanwhile."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model together; by itself unless told otherwise.

    Attributes:
        rank: from 0.
        world: the number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Self:
        """The processes of torch's default group, where there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def share(self, length: int) -> slice:
        """Which of some items are this process's: consecutive, to one as many as the others', and perhaps none.

        The first process has some wherever there are any.
        """
        each, more = divmod(length, self.world)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def gather(self, own: Tensor, whole: int) -> Tensor:
        """All processes' shares [N] of N items, in their order; this one's keeps its gradient.

        Args:
            own: [n] this process's share. Where that is empty, a row more than it is left out, and gets a gradient
                of zero: the backward passes of all processes stay alike.
            whole: N.
        """
        if self.world == 1:
            return own
        mine = self.share(whole)
        every = own.new_zeros(whole)
        every[mine] = own.detach()[: mine.stop - mine.start]
        dist.all_reduce(every)
        return torch.cat([every[: mine.start], own, every[mine.stop :]])[:whole]

    def collect(self, own: T) -> list[T]:
        """All processes' objects, in their order."""
        if self.world == 1:
            return [own]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, own)
        return every

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are summed over all processes in the backward pass (`gradients_summed`).

        All processes get the first one's parameters and buffers. Every parameter that is trained must get a gradient.
        """
        if self.world == 1:
            return model
        device = next(model.parameters()).device
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        wrapped.register_comm_hook(None, _sum)
        return wrapped

    def spread_buffers(self, model: nn.Module) -> None:
        """Gives all processes the first one's buffers: batch norm's statistics, where each has its own."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


ALONE = Ranks()


class Shares:
    """One process's share of each batch of indices, as a DataLoader's batch sampler.

    A process without a share gets the batch's first clip, for a pass through the model must have something to read.
    """

    def __init__(self, whole: Iterable[list[int]], ranks: Ranks) -> None:
        self.whole, self.ranks = whole, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole:
            yield batch[self.ranks.share(len(batch))] or batch[:1]


def gradients_summed(forward: object, now: bool) -> contextlib.AbstractContextManager[None]:
    """Within the block, a forward and backward pass sums the gradients over processes, or leaves it to a later one.

    Args:
        forward: what `Ranks.parallel` gave.
        now: sum what has been collected since the last sum.
    """
    if now or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def take_compile_cache() -> None:
    """Gives this process a folder for torch.compile's results that no other process uses meanwhile.

    Processes that build the same C++ library in one folder may load it while another still writes it (torch 2.13:
    "file too short"). The folders are numbered, and the next process takes over what the last one left.
    """
    if _compile_cache:
        return
    base = Path(
        os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
    )
    for number in itertools.count():
        folder = base / f"qafe-{number}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / "in_use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            _compile_cache.append(descriptor)  # Locked for as long as the process lives.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
            return


_compile_cache: list[int] = []


def local_rank() -> int | None:
    """This process's number on this machine, or None where there is only one process."""
    return int(os.environ["LOCAL_RANK"]) if _launched() and "LOCAL_RANK" in os.environ else None


@contextlib.contextmanager
def launched() -> Iterator[Callable[[torch.device], Ranks]]:
    """Gives a function that joins the processes which torchrun started, in NCCL on GPUs and in gloo on CPUs.

    The block's end waits for all of them. Of errors in several processes, the first leaves the block; the other
    processes end without a word, and so do those whose communication breaks off because of it. torchrun ends a
    process that still waits for one that failed. Without torchrun, there is one process and nothing to join.

    Raises:
        ConfigError: (from the function) the device is another process's GPU.
    """
    if not _launched():
        yield lambda device: ALONE
        return
    store, rank, world = next(iter(rendezvous("env://", timeout=TIMEOUT)))

    def join(device: torch.device) -> Ranks:
        gpu = device if device.type == "cuda" else None
        if gpu is not None:
            if gpu.index != local_rank():
                raise ConfigError(
                    f"each process that torchrun starts must have a GPU of its own, got {gpu} for process "
                    f"{local_rank()} (--device). Set --device cuda, and CUDA_VISIBLE_DEVICES to choose among GPUs."
                )
            torch.cuda.set_device(gpu)
        dist.init_process_group(
            "gloo" if gpu is None else "nccl",
            store=PrefixStore("training", store),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=gpu,
        )
        return Ranks.current()

    try:
        yield join
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException as err:
        if _first_to_fail(store):
            raise
        if isinstance(err, KeyboardInterrupt):
            raise SystemExit(INTERRUPTED) from None
        let_others_speak()
        raise SystemExit(USER_ERROR) from None


def _launched() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _first_to_fail(store: Store) -> bool:
    try:
        return int(store.add("failed", 1)) == 1
    except RuntimeError:  # The store has ended with its process, or with torchrun.
        return True


def _sum(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's communication hook that sums; its own divides by the number of processes."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed
