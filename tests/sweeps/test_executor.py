"""``python -m qafe prepare --address``: a real Ray cluster, started here on free ports and ended by its process."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path

import psutil
import pytest

from qafe.__main__ import main
from qafe.errors import FaceError
from sweeps.executor import RayExecutor
from tests.faces import fakes
from tests.faces.test_prepare import clips, error, line, refusals, tree
from tests.tracking.stores import free_port

__all__ = ["clips"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with two CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # its sockets need a short path
    port = free_port()
    program = str(Path(sys.executable).with_name("ray"))
    flags = ["--head", "--block", "--num-cpus", "2", "--port", str(port)]
    flags += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", str(folder)]
    flags += ["--object-store-memory", "100000000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [program, "start", *flags], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        for child in alive:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_calls_answer_as_of_any_executor(cluster: str, tmp_path: Path) -> None:
    with RayExecutor(cluster) as executor:
        assert executor.submit(fakes.pid_after, 0).result(timeout=60) != os.getpid()
        with pytest.raises(ValueError, match=r"^only mine$"):
            executor.submit(fakes.fail, "only mine").result(timeout=60)
        with pytest.raises(FaceError, match=r"^one line$"):
            executor.submit(fakes.refuse, "one line").result(timeout=60)
        assert executor.submit(fakes.die_once, tmp_path / "mark").result(timeout=60) == "done"
        (tmp_path / "dead").mkdir()
        with pytest.raises(BrokenExecutor):
            executor.submit(fakes.die, tmp_path / "dead").result(timeout=60)
        assert len(list((tmp_path / "dead").iterdir())) == 2
        left = executor.submit(fakes.pid_after, 600, tmp_path / "pid")
        fakes.wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    fakes.wait_for(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text())))
    del left


def test_a_cluster_prepares_what_one_machine_prepares(
    cluster: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(line(clips, out, "--address", cluster)) == 0
    assert main(line(clips, tmp_path / "alone", "--workers", "1")) == 0
    assert tree(out) == tree(tmp_path / "alone")
    bad = shutil.copytree(clips, tmp_path / "clips")
    (bad / "videos" / "P05" / "visit 1.mp4").write_bytes(b"")
    capsys.readouterr()
    assert main(line(bad, out, "--address", cluster, "--resume", "--test-patients", "P01")) == 2
    (refused,) = refusals(capsys.readouterr().err)
    assert refused.startswith("P05/visit 1.mp4: a video file must not be empty, got 0 bytes in P05/visit 1.mp4.")


def test_no_cluster_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--labels", str(tmp_path / "labels.csv"), "--address", f"127.0.0.1:{free_port()}"]
    start = time.monotonic()
    assert main(["prepare", str(tmp_path), str(tmp_path / "out"), *flags]) == 2
    assert time.monotonic() - start < 30
    assert "there must be a Ray cluster at '127.0.0.1:" in error(capsys.readouterr().err)
