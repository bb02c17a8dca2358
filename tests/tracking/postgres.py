"""A PostgreSQL of one's own for tests: a fresh cluster on a free port, ended with the block."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from .stores import free_port

PROGRAMS = ("initdb", "postgres")


def installed() -> bool:
    """Whether there is a PostgreSQL to start."""
    return all(map(_program, PROGRAMS))


def _program(name: str) -> str | None:
    places = os.pathsep.join([os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))])
    return shutil.which(name, path=places)


@contextmanager
def postgres() -> Iterator[str]:
    """The URI of an empty database."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    line: list[str] = []
    if os.geteuid() == 0:  # it refuses to be run by root
        line = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        os.chown(folder, 65534, 65534)
    port = free_port()
    data = str(folder / "data")
    log = open(folder / "log", "wb")  # noqa: SIM115
    start = [*line, str(_program("postgres")), "-D", data, "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
    process = None
    try:
        make = [*line, str(_program("initdb")), "-D", data, "-U", "qafe", "--auth=trust", "--no-sync"]
        subprocess.run(make, cwd=folder, check=True, stdout=log, stderr=log)
        process = subprocess.Popen([*start, "-c", "fsync=off"], cwd=folder, stdout=log, stderr=log)
        for _ in range(300):
            try:
                with psycopg.connect(f"postgresql://qafe@127.0.0.1:{port}/postgres", autocommit=True) as made:
                    made.execute("CREATE DATABASE mlflow")
                break
            except psycopg.OperationalError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
        yield f"postgresql://qafe@127.0.0.1:{port}/mlflow"
    finally:
        if process:
            process.send_signal(signal.SIGINT)  # at once; with SIGTERM it waits for clients
            process.wait(timeout=30)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
