"""Errors of the machine are said as such, whoever blamed the data for them."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sweeps.driver
from qafe import console
from qafe.errors import ConfigError, MachineError, ManifestError
from qafe.machine_errors import TROUBLES, in_true_words, machine_cause, raise_open_files
from qafe.store import Store
from sweeps.command import main
from tests.conftest import QUICK_FLAGS
from tests.tracking.stores import embedded


@pytest.mark.parametrize("number", TROUBLES, ids=errno.errorcode.get)
def test_a_reader_that_fails_for_the_machine_says_so(
    number: int, sample_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: Path, **_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    store = Store(sample_root)
    patient, video = next(found for found in store.videos() if store.has_landmarks(*found))
    monkeypatch.setattr(np, "load", load)
    assert console.run(lambda _: store.read_landmarks(patient, video) and 0, console.parser("p", ""), []) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{TROUBLES[number].words}, got {errno.errorcode[number]} ({store.landmarks_path(patient, video)})" in said
    assert "prepare" not in said


def test_the_data_is_blamed_for_its_own() -> None:
    for err in (FileNotFoundError(errno.ENOENT, "no"), ValueError("no"), OSError("no number")):
        blamed = ManifestError("a row is wrong")
        blamed.__cause__ = err
        assert in_true_words(blamed) is None
    setting = ConfigError("the folder must be one that can be written")
    setting.__cause__ = OSError(errno.EACCES, "no")
    assert in_true_words(setting) is None, "that line says what to do already"
    assert machine_cause(setting) is setting.__cause__


def test_a_process_that_may_open_few_files_says_so(sample_root: Path) -> None:
    code = (
        "import sys; from qafe.store import Store; from qafe import console\n"
        "def read(_):\n"
        "    held = []\n"
        "    while True:\n"
        "        store = Store(sys.argv[1])\n"
        "        for video in store.videos():\n"
        "            held.append(open(store.landmarks_path(*video)))\n"
        "            store.read_landmarks(*video)\n"
        "sys.exit(console.run(read, console.parser('p', ''), []))"
    )

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    line = [sys.executable, "-c", code, str(sample_root)]
    done = subprocess.run(line, preexec_fn=few, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "got EMFILE" in done.stderr
    assert "ulimit -n" in done.stderr


def test_the_soft_limit_of_open_files_becomes_the_hard_one() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        assert raise_open_files() == before[1]
        child = subprocess.run(["sh", "-c", "ulimit -Sn"], capture_output=True, text=True)
        assert int(child.stdout) == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("number", TROUBLES, ids=errno.errorcode.get)
def test_a_driver_that_fails_for_the_machine_says_how_to_go_on(
    number: int, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number), "study.journal")

    monkeypatch.setattr(sweeps.driver, "run_sweep", fail)
    line = ["fusion_search", "--data-root", str(sample_root), "--storage", str(tmp_path), "--name", "s"]
    assert main([*line, "--preset", "tiny", "--tracking-uri", embedded(tmp_path), *QUICK_FLAGS]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"interrupted, for {TROUBLES[number].words} ([Errno {number}]")
    assert said.endswith(f"go on with:  python -m sweeps.run fusion_search --resume --name s --storage {tmp_path}")


def test_few_open_files_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from sweeps.command import main; sys.exit(main(['fusion_search', '--trials', '0']))"

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=few, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "a process may open 256 files here (ulimit -Hn)" in done.stderr


def test_the_tree_of_errors_has_it() -> None:
    assert isinstance(in_true_words(OSError(errno.ESTALE, "x")), MachineError)
