"""The server's process: what is noted about it, whether it still is that process, whether it answers, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from qafe.errors import TrackingError

from .connection import masked

STATE_FILE = "server.json"
LOG_FILE = "server.log"
LOG_BYTES = 20_000_000
START_PATIENCE_S = 120.0
STOP_PATIENCE_S = 15.0


@dataclass(frozen=True, kw_only=True)
class State:
    """What is noted about a server that was started.

    Args:
        pid: of the mlflow process, whose child answers.
        started: when that process began, seconds since 1970: another one may get its pid later.
        url: where it answers on this machine.
        store: the database, without a password.
        artifacts: where artifacts lie.
        accounts: whether it asks for a password.
        version: of MLflow.
    """

    pid: int
    started: float
    url: str
    store: str
    artifacts: str
    accounts: bool
    version: str

    def process(self) -> psutil.Process | None:
        """The process, if it is still there and still the same."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def write(self, home: Path) -> None:
        """Notes it, whole or not at all."""
        unfinished = home / f".{STATE_FILE}.unfinished"
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(unfinished, home / STATE_FILE)


def running(home: Path) -> State | None:
    """The server that runs over this folder; a note of one that is gone counts for nothing."""
    try:
        state = State(**json.loads((home / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return state if state.process() else None


def answers(url: str) -> bool:
    """Whether a server says that it is well."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200 and answer.read(16) == b"OK")
    except (urllib.error.URLError, OSError, ValueError):
        return False


def started_at(pid: int) -> float:
    """When a process began, seconds since 1970."""
    return float(psutil.Process(pid).create_time())


def start_in_background(line: Sequence[str], environment: Mapping[str, str], home: Path) -> int:
    """Starts a server of its own session, whose words go to a log; returns its pid."""
    log = home / LOG_FILE
    if log.exists() and log.stat().st_size > LOG_BYTES:
        os.replace(log, log.with_name(f"{LOG_FILE}.1"))
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
        process = subprocess.Popen(
            line, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    return process.pid


def wait_until_it_answers(state: State, home: Path, patience_s: float = START_PATIENCE_S) -> None:
    """Returns when the server answers.

    Raises:
        TrackingError: it ended or kept silent; it does not run on.
    """
    deadline = time.monotonic() + patience_s
    while not answers(state.url):
        gone = state.process() is None
        if gone or time.monotonic() > deadline:
            said = _last_error(home / LOG_FILE)
            stop(state)
            raise TrackingError(
                f"the server must answer at {state.url}/health, it {'ended' if gone else 'kept silent'}: {said}. "
                f"See {home / LOG_FILE}."
            )
        time.sleep(0.1)


def stop(state: State, patience_s: float = STOP_PATIENCE_S) -> bool:
    """Asks the server to end what it is at, ends it for good when patience runs out; whether it ended by itself."""
    process = state.process()
    if process is None:
        return True
    with contextlib.suppress(psutil.Error):
        family = [process, *process.children(recursive=True)]
        process.terminate()
        _, left = psutil.wait_procs(family, timeout=patience_s)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=patience_s)
        return not left
    return True


def _last_error(log: Path) -> str:
    with contextlib.suppress(OSError), open(log, "rb") as written:
        written.seek(max(0, log.stat().st_size - 20_000))
        lines = [line.strip() for line in written.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "exception" in line.lower()]
        return masked((errors or lines or [""])[-1])[:300]
    return ""
