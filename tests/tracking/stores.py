"""Tracking stores for tests: an embedded one, and a real server on a free port."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracking.server import ENVIRONMENT, command


def embedded(folder: Path) -> str:
    """URI of an embedded store in a folder."""
    return f"sqlite:////{str(folder / 'mlflow.db').lstrip('/')}"


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, port: int, backend: str = "") -> Iterator[str]:
    """An MLflow server over a folder's embedded store, or another; ended with the block."""
    line = command(backend or embedded(folder), folder / "mlartifacts", "127.0.0.1", port)
    log = open(folder / "server.log", "ab")  # noqa: SIM115
    process = subprocess.Popen(line, cwd=folder, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
    try:
        uri = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=1) as answer:
                    if answer.status == 200:
                        break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.1)
        else:
            raise AssertionError("the server did not come up in two minutes")
        yield uri
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()
