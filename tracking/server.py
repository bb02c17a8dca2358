"""python -m tracking.server: the MLflow server and its UI over the embedded store or a database."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from qafe import console
from qafe.errors import TrackingError

from .connection import EMBEDDED_FILE, embedded_path, masked, resolve_uri

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Without the job runner the server is 2 processes, not 9; nothing here submits jobs.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server in the foreground until it is interrupted."""
    parser = console.parser("python -m tracking.server", "Start the MLflow server and its UI.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--backend",
        help=f"sqlite:///FILE or postgresql://... (default: {EMBEDDED_FILE} in this folder, as the sweeps use it)",
    )
    parser.add_argument("--artifacts", type=Path, help="folder for artifacts (default: mlartifacts beside the store)")
    parser.add_argument("--allowed-hosts", help="Host headers to answer, with commas; needed where --host is not local")
    return console.run(_serve, parser, argv)


def command(backend: str, artifacts: Path, host: str, port: int, allowed_hosts: str | None = None) -> list[str]:
    """The mlflow command line that serves a store. One worker: more of them answer more slowly."""
    line = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend]
    line += ["--artifacts-destination", str(artifacts), "--host", host, "--port", str(port), "--workers", "1"]
    return line + (["--allowed-hosts", allowed_hosts] if allowed_hosts else [])


def _serve(options: argparse.Namespace) -> int:
    backend = resolve_uri(options.backend or f"sqlite:///{EMBEDDED_FILE}")
    if backend.startswith(("http:", "https:")):
        raise TrackingError(
            f"the server keeps its data in a database, got {masked(backend)} (--backend). "
            "Name sqlite:///FILE or postgresql://..."
        )
    if not 1 <= options.port <= 65535:
        raise TrackingError(f"a port is a number from 1 to 65535, got {options.port} (--port). Name another --port.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as err:
            raise TrackingError(
                f"the port must be free, {options.host}:{options.port} is not ({err.strerror}). Name another --port."
            ) from err
    beside = embedded_path(backend)
    artifacts = options.artifacts or (beside.parent if beside else Path.cwd()) / "mlartifacts"
    line = command(backend, artifacts.resolve(), options.host, options.port, options.allowed_hosts)
    print(f"MLflow UI: http://{options.host}:{options.port}  (store: {masked(backend)})", file=sys.stderr, flush=True)
    os.execve(line[0], line, os.environ | ENVIRONMENT)


if __name__ == "__main__":
    sys.exit(main())
