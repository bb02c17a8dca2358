import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tracking.server import main

from .stores import free_port, server


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
    process = subprocess.Popen(
        [sys.executable, "-m", "tracking.server", "--port", str(port)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert f"http://127.0.0.1:{port}" in process.stderr.readline()
        for line in process.stderr:
            if "Uvicorn running" in line:  # startup is complete before the port is open
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
            assert answer.status == 200
        assert (tmp_path / "mlflow.db").exists()
    finally:
        process.terminate()
        process.wait(timeout=30)
