"""python -m tracking.server: the MLflow server and its UI over the embedded store or a database.

Without a command it runs in the foreground. README.md in this folder has a guide.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow

from qafe import console
from qafe.errors import TrackingError
from qafe.filesystem import check_database

from . import accounts, backup, gc, process
from .connection import EMBEDDED_FILE, check_place
from .database import ARTIFACTS_FOLDER, HOME_FOLDER, Database, named
from .migrate import prepare

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Without the job runner the server is 2 processes, not 9; nothing here submits jobs.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
COMMANDS = ("start", "stop", "status", "backup", "restore", "gc", "user")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = console.parser("python -m tracking.server", "The MLflow server and its UI; without a command: start.")
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    shared.add_argument(
        "--backend",
        help="sqlite:///FILE or postgresql://... (default: MLFLOW_BACKEND_STORE_URI, or "
        f"{EMBEDDED_FILE} in this folder, as the sweeps use it)",
    )
    shared.add_argument(
        "--artifacts", help=f"folder or s3:// address of artifacts (default: {ARTIFACTS_FOLDER} beside the store)"
    )
    shared.add_argument(
        "--home", type=Path, help=f"folder of accounts, state and log (default: {HOME_FOLDER} beside the store)"
    )
    sub = commands.add_parser("start", parents=[shared], help="start the server")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    sub.add_argument("--port", type=int, default=5000)
    sub.add_argument("--auth", action="store_true", help="ask for name and password (tracking.server user)")
    sub.add_argument("--allowed-hosts", help="Host headers to answer, with commas; needed where --host is not local")
    sub.add_argument("--artifact-places", metavar="PLACES", help="where experiments may have their artifacts beside "
                     "--artifacts, e.g. s3://bucket/studies, with commas; for --auth")  # fmt: skip
    sub.add_argument("--background", action="store_true", help="return once it answers")
    sub.set_defaults(run=_start)
    sub = commands.add_parser("stop", parents=[shared], help="end the server that runs over this store")
    sub.set_defaults(run=_stop)
    sub = commands.add_parser("status", parents=[shared], help="where it answers, and how large it is")
    sub.add_argument("--json", action="store_true")
    sub.set_defaults(run=_status)
    sub = commands.add_parser("backup", parents=[shared], help="copy everything, while it runs, to a new folder")
    sub.add_argument("folder", type=Path, help="a folder that does not exist yet")
    sub.set_defaults(run=lambda o: backup.run_backup(o.folder, named(o.backend), _artifacts(o), _home(o)))
    sub = commands.add_parser("restore", parents=[shared], help="put a backup into an empty place")
    sub.add_argument("folder", type=Path, help="what backup wrote")
    sub.add_argument("target", type=Path, help="a folder that does not exist yet, for database, artifacts, accounts")
    sub.set_defaults(run=lambda o: backup.run_restore(o.folder, o.target, o.backend))
    sub = commands.add_parser("gc", parents=[shared], help="remove for good what was deleted in MLflow")
    gc.add_arguments(sub)
    sub.set_defaults(run=lambda o: gc.run_command(o, named(o.backend), _artifacts(o), _home(o)))
    sub = commands.add_parser("user", parents=[shared], help="accounts of a server with --auth")
    accounts.add_arguments(sub)
    sub.set_defaults(run=lambda o: accounts.run_command(o, _home(o), named(o.backend)))
    return console.run(lambda options: int(options.run(options)), parser, _with_command(argv))


def command(
    backend: str, artifacts: Path | str, host: str, port: int, allowed_hosts: str | None = None, auth: bool = False
) -> list[str]:
    """The mlflow command line that serves a store. One worker: more of them answer more slowly."""
    line = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend]
    line += ["--artifacts-destination", str(artifacts), "--host", host, "--port", str(port), "--workers", "1"]
    line += ["--allowed-hosts", allowed_hosts] if allowed_hosts else []
    return line + (["--app-name", "qafe"] if auth else [])


def _with_command(argv: Sequence[str] | None) -> list[str]:
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((word for word in words if word != "--debug"), "--")
    return ["start", *words] if first.startswith("-") and first not in ("-h", "--help", "--version") else words


def _start(options: argparse.Namespace) -> int:
    database, artifacts, home = named(options.backend), _artifacts(options), _home(options)
    _check_address(options)
    check_place(database.uri, "--backend")
    if options.auth:
        check_database(home, "--home: the accounts")
    accounts.own_folder(home)
    with open(home / ".lock", "w") as lock:  # inherited by no server: it is closed before one runs on
        fcntl.flock(lock, fcntl.LOCK_EX)
        if state := process.running(home):
            raise TrackingError(
                f"a store has one server, one runs at {state.url} already (pid {state.pid}, {home}). "
                "End it first: python -m tracking.server stop."
            )
        _check_port(options)
        prepare(database)
        own = ENVIRONMENT | (accounts.environment(home, options.artifact_places or "") if options.auth else {})
        quiet = {} if options.debug else {"PYTHONWARNINGS": "ignore"}  # of libraries, about others
        environment = quiet | {n: value for n, value in os.environ.items() if n != accounts.ADMIN_PASSWORD_VARIABLE}
        line = command(database.uri, artifacts, options.host, options.port, options.allowed_hosts, options.auth)
        pid = process.start_in_background(line, environment | own, home) if options.background else os.getpid()
        state = process.State(
            pid=pid,
            started=process.started_at(pid),
            url=_url(options.host, options.port),
            store=database.uri,
            artifacts=artifacts,
            accounts=options.auth,
            version=mlflow.__version__,
        )
        state.write(home)
        if options.background:
            process.wait_until_it_answers(state, home)
    print(f"MLflow UI: {state.url}  (store: {state.store})", file=sys.stderr, flush=True)
    if not options.background:
        os.execve(line[0], line, environment | own)
    return 0


def _stop(options: argparse.Namespace) -> int:
    home = _home(options)
    state = process.running(home)
    if state is None:
        raise TrackingError(f"a server must run to be stopped, none is noted in {home} (--home, --backend).")
    gently = process.stop(state)
    (home / process.STATE_FILE).unlink(missing_ok=True)
    print(f"stopped{'' if gently else ', with SIGKILL'}: pid {state.pid}, {state.url}", file=sys.stderr)
    return 0


def _status(options: argparse.Namespace) -> int:
    """Exit status 0 where a server runs and answers, 1 otherwise."""
    database, artifacts, home = named(options.backend), _artifacts(options), _home(options)
    state = process.running(home)
    healthy = state is not None and process.answers(state.url)
    place = state.artifacts if state else artifacts
    facts: dict[str, Any] = {
        "server": "not running" if state is None else "answers" if healthy else "runs, but does not answer",
        "url": state.url if state else "",
        "pid": state.pid if state else None,
        "accounts": state.accounts if state else (home / accounts.DATABASE_FILE).exists(),
        "mlflow": state.version if state else mlflow.__version__,
        "store": database.uri,
        "store_bytes": database.size_bytes(),
        "artifacts": place,
        "artifacts_bytes": None if "://" in place else backup.folder_bytes(Path(place)),
        "home": str(home),
    }
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            if value not in (None, ""):
                print(f"{name:16} {backup.readable(value) if name.endswith('_bytes') else value}")
    return 0 if healthy else 1


def _artifacts(options: argparse.Namespace) -> str:
    """Where artifacts lie: an absolute folder or an S3 address."""
    given = options.artifacts
    if given and "://" in given:
        if not given.startswith("s3://"):
            raise TrackingError(f"artifacts lie in a folder or at s3://, got {given} (--artifacts). Name one of them.")
        if importlib.util.find_spec("boto3") is None:
            raise TrackingError("artifacts at s3:// need boto3, which is not installed. pip install 'qafe-net[s3]'.")
        return str(given)
    return str(Path(given).resolve() if given else _beside(named(options.backend)) / ARTIFACTS_FOLDER)


def _home(options: argparse.Namespace) -> Path:
    return (options.home or _beside(named(options.backend)) / HOME_FOLDER).resolve()


def _beside(database: Database) -> Path:
    return database.file.parent if database.file else Path.cwd()


def _check_address(options: argparse.Namespace) -> None:
    """Others than this machine reach only a server that asks for a password and knows its own names."""
    if not 1 <= options.port <= 65535:
        raise TrackingError(f"a port is a number from 1 to 65535, got {options.port} (--port). Name another --port.")
    if _is_loopback(options.host):
        return
    hosts = [host.strip() for host in (options.allowed_hosts or "").split(",") if host.strip()]
    if not options.auth or not hosts or "*" in hosts:
        raise TrackingError(
            f"a server that other machines reach needs --auth and --allowed-hosts with its own names, got --host "
            f"{options.host} {'with' if options.auth else 'without'} --auth and with --allowed-hosts "
            f"{options.allowed_hosts or 'not given'}. Give both, or neither and ssh -L 5000:localhost:5000."
        )


def _is_loopback(host: str) -> bool:
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError as err:
        raise TrackingError(
            f"the address must be one of this machine, {host} is not known ({err.strerror}) (--host). Name another one."
        ) from err
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _check_port(options: argparse.Namespace) -> None:
    family = socket.getaddrinfo(options.host, None)[0][0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as err:
            raise TrackingError(
                f"the port must be free, {options.host}:{options.port} is not ({err.strerror}). Name another --port."
            ) from err


def _url(host: str, port: int) -> str:
    """Where a server answers on this machine itself."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


if __name__ == "__main__":
    sys.exit(main())
