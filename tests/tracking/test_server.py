import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import psutil
import pytest

from qafe.errors import TrackingError
from tracking import process
from tracking.server import main

from .stores import free_port, server


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_used_port_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("port", [0, 99999])
def test_a_port_is_a_number_that_exists(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: a port is a number from 1 to 65535, got {port}")


def test_a_server_is_no_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", "http://127.0.0.1:5000"]) == 2
    assert "the server keeps its data in a database" in capsys.readouterr().err


def test_it_starts_in_the_background_and_ends_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    home = tmp_path / "mlflow-server"
    assert main(["status"]) == 1
    assert "not running" in capsys.readouterr().out
    assert main(["stop"]) == 2
    assert main(["start", "--port", str(port), "--background"]) == 0
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
        capsys.readouterr()
        assert main(["status", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["server"], facts["url"]) == ("answers", f"http://127.0.0.1:{port}")
        assert facts["mlflow"] == mlflow.__version__
        assert facts["store_bytes"] == (tmp_path / "mlflow.db").stat().st_size > 0
        line = Path(f"/proc/{facts['pid']}/cmdline").read_text().split("\0")
        assert "mlflow" in line
        assert main(["start", "--port", str(free_port())]) == 2
        assert f"one runs at http://127.0.0.1:{port} already (pid {facts['pid']}" in capsys.readouterr().err
        assert "Warning" not in (home / "server.log").read_text(), "of libraries, about each other"
        family = psutil.Process(facts["pid"]).children(recursive=True)
        assert family
    finally:
        assert main(["stop"]) == 0
    assert not any(process.is_running() for process in family)
    assert not psutil.pid_exists(facts["pid"]) or psutil.Process(facts["pid"]).status() == psutil.STATUS_ZOMBIE
    assert not (home / "server.json").exists()
    assert main(["status"]) == 1


def test_a_note_of_a_server_that_is_gone_counts_for_nothing(tmp_path: Path) -> None:
    own = psutil.Process()
    facts = {"url": "http://127.0.0.1:1", "store": "", "artifacts": "", "accounts": False, "version": ""}
    (tmp_path / "server.json").write_text(json.dumps(facts | {"pid": own.pid, "started": own.create_time()}))
    assert process.running(tmp_path) is not None
    # The pid is taken, by a process that began at another time.
    (tmp_path / "server.json").write_text(json.dumps(facts | {"pid": own.pid, "started": own.create_time() - 60}))
    assert process.running(tmp_path) is None
    for damaged in ("", "{", "[]", '{"pid": 1}'):
        (tmp_path / "server.json").write_text(damaged)
        assert process.running(tmp_path) is None


def test_one_that_does_not_end_is_ended(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    state = process.State(
        pid=child.pid, started=process.started_at(child.pid), url="", store="", artifacts="", accounts=False, version=""
    )
    assert process.stop(state, patience_s=0.5) is False
    assert not psutil.pid_exists(child.pid)
    assert process.stop(state) is True


def test_one_that_cannot_start_says_why(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "raise SystemExit('Error: no such thing as http://ana:geheim@host')"]
    pid = process.start_in_background(line, os.environ, tmp_path)
    state = process.State(
        pid=pid, started=process.started_at(pid), url="http://127.0.0.1:1", store="", artifacts="", accounts=False,
        version="",
    )  # fmt: skip
    with pytest.raises(TrackingError, match=r"it ended: Error: no such thing as http://ana:\*\*\*@host"):
        process.wait_until_it_answers(state, tmp_path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--artifacts", "gs://bucket"], "artifacts lie in a folder or at s3://"),
        (["--host", "no-such-host.invalid"], "the address must be one of this machine"),
    ],
)
def test_what_cannot_be_served_is_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", *flags]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_it_answers_this_machine_and_no_other_name(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, port) as uri:
        with urllib.request.urlopen(f"{uri}/health", timeout=10) as answer:
            assert answer.status == 200
        foreign = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1")
        foreign.add_header("Host", "evil.example")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(foreign, timeout=10)
        assert refused.value.code == 403


def test_the_command_serves_the_embedded_store(tmp_path: Path) -> None:
    port = free_port()
    server_process = subprocess.Popen(
        [sys.executable, "-m", "tracking.server", "--port", str(port)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server_process.stderr is not None
        assert f"http://127.0.0.1:{port}" in server_process.stderr.readline()
        for line in server_process.stderr:
            assert "Warning" not in line, "of libraries, about each other"
            if "Uvicorn running" in line:  # startup is complete before the port is open
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
            assert answer.status == 200
        assert (tmp_path / "mlflow.db").exists()
    finally:
        server_process.terminate()
        server_process.wait(timeout=30)
