"""The Ray that a sweep runs on: one of its own on this machine, or a cluster at an address; and what of it has gone.

A Ray of our own is ``ray start --block`` in a session of its own, and its processes do not hear SIGTERM: whoever ends
a process group (``timeout``), a unit (``systemctl stop``) or a job (``scancel``) signals all of its processes at once,
and the driver has its runs to close first. It ends with its driver, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import ray

from qafe import allocation
from qafe.console import USER_ERROR
from qafe.errors import ConfigError

from .executor import probe
from .interruption import INTERRUPTION
from .supervisor import NOTES, PR_SET_PDEATHSIG

STARTS_WITHIN_S = 180.0
POLL_S = 0.05
LOOK_S = 0.5
PATIENCE_S = 20.0
"""How long a cluster may be silent: Ray itself ends the driver, without a word of ours, after 60 s."""
ENDED_WITHIN_S = 10.0
LONGEST_FOLDER = 30
"""Characters of a temporary folder below which Ray's sockets have names that the system allows."""

Gone = Callable[[], str]
"""What of Ray has gone, in words; empty as long as all of it is there."""


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[Gone]:
    """Within the block, this process is connected to the cluster at the address, or to a Ray of its own.

    Raises:
        ConfigError: nobody answers there, or Ray does not start here.
    """
    with contextlib.ExitStack() as stack:
        if address:
            try:
                probe(address)
            except OSError as err:
                raise _no_answer(address, err) from err
            gone = None
        else:
            address, gone = stack.enter_context(_own_ray())
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except SystemExit as err:  # SIGTERM, where Ray has just set a handler of its own
            raise KeyboardInterrupt from err
        except (OSError, ValueError, RuntimeError) as err:
            raise _no_answer(address, err) from err
        finally:
            INTERRUPTION.listen()
            stack.callback(ray.shutdown)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a lost worker is said in one line, by us
        yield gone or _silence()


def _no_answer(address: str, err: Exception) -> ConfigError:
    return ConfigError(
        f"a Ray cluster must answer at --address, got {type(err).__name__} from {address} "
        f"({' '.join(str(err).split())}). Start a cluster with ray start --head, or leave --address out."
    )


@contextlib.contextmanager
def watched(gone: Gone) -> Iterator[None]:
    """Within the block, this process ends when something of Ray has gone: calls to it would wait for a minute, and then
    Ray itself would end the process. `supervisor` does the rest."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(LOOK_S):
            if reason := gone():
                NOTES.tell(gone=reason)
                os._exit(USER_ERROR)

    threading.Thread(target=watch, name="ray", daemon=True).start()
    try:
        yield
    finally:
        left.set()


@contextlib.contextmanager
def _own_ray() -> Iterator[tuple[str, Gone]]:
    """Address of a Ray for this process alone."""
    folder = Path(tempfile.mkdtemp(prefix="qafe-ray-", dir=_temporary_folder()))  # its owner's alone; Ray's is not
    NOTES.tell(scratch=str(folder))
    line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    line += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--include-log-monitor=false"]
    line += ["--disable-usage-stats", f"--temp-dir={folder / 'ray'}"]
    line += [f"--num-cpus={allocation.cores()}", f"--num-gpus={allocation.gpus()}"]
    line += [f"--memory={allocation.memory().free}"]
    libc = ctypes.CDLL(None)  # looked up before the fork
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited by all that Ray starts
    try:
        with open(folder / "ray.log", "wb") as log:
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield _address(process, folder), lambda: "" if process.poll() is None else "its Ray has ended"
    finally:
        family = [each for each in psutil.process_iter() if _session(each.pid) == process.pid]
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()
        psutil.wait_procs(family, timeout=ENDED_WITHIN_S)
        shutil.rmtree(folder, ignore_errors=True)


def _address(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Where a Ray that has just been started answers.

    Raises:
        ConfigError: it ends, or takes too long.
    """
    place, deadline = folder / "ray" / "ray_current_cluster", time.monotonic() + STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if place.read_text().strip():
                return place.read_text().strip()
        time.sleep(POLL_S)
    said = [row.strip() for row in (folder / "ray.log").read_text(errors="replace").splitlines() if row.strip()]
    how = f"ended with status {process.returncode}" if process.poll() is not None else "has not started"
    raise ConfigError(
        f"Ray must start on this machine, it {how} after {STARTS_WITHIN_S - (deadline - time.monotonic()):.0f} s: "
        f"{said[-1] if said else 'it says nothing'}. Look at the machine's memory, shared memory (/dev/shm) and limits "
        "(ulimit -a), or name a cluster with --address."
    )


def _temporary_folder() -> str:
    """The system's, unless Ray's sockets below it would have names that are too long."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_FOLDER else "/tmp"


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _silence() -> Gone:
    """Of a cluster: whether its GCS, or the raylet through which this process speaks to it, is silent for too long."""
    context = ray.get_runtime_context()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    here = next(node for node in nodes if node["NodeID"] == context.get_node_id())
    parts = {
        f"the GCS of its Ray cluster ({context.gcs_address})": context.gcs_address.rpartition(":")[::2],
        "the Ray node of this machine": (here["NodeManagerAddress"], here["NodeManagerPort"]),
    }
    heard = dict.fromkeys(parts, time.monotonic())

    def gone() -> str:
        for name, (host, port) in parts.items():
            with contextlib.suppress(OSError):
                socket.create_connection((host, int(port)), timeout=LOOK_S).close()
                heard[name] = time.monotonic()
            if time.monotonic() - heard[name] > PATIENCE_S:
                return f"{name} has gone"
        return ""

    return gone
