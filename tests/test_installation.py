"""Commands say their version, work from a clone that was never installed, and name what this Python lacks."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from qafe import installation
from qafe.installation import entry_point, version
from tests.conftest import QUICK_FLAGS

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "qafe",
    *(f"sweeps.{name}" for name in ("run", "status", "stop", "pause", "continue")),
    *(f"tracking.{name}" for name in ("server", "registry", "runs", "export")),
]


def run(python: Path | str, *line: str, clone: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, *line], cwd=clone, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_its_version(command: str) -> None:
    done = run(sys.executable, "-m", command, "--version")
    assert (done.returncode, done.stdout) == (0, f"qafe-net {version()}\n")


def test_these_are_all_commands() -> None:
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__").replace("command", "run")
        for room in ("qafe", "sweeps", "tracking")
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"console\.run\(", path.read_text())
    }
    assert found == set(COMMANDS)


@pytest.mark.parametrize("command", ["qafe", "sweeps.run", "sweeps.status", "tracking.server"])
def test_a_python_without_the_libraries_is_named_in_one_line(command: str) -> None:
    done = run(sys.executable, "-S", "-m", command, "--help")
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: the project's libraries must be installed")
    assert "has no numpy, torch." in error
    assert ".venv/bin/pip install -c constraints.txt -e ." in error
    assert done.stdout == ""


def test_setup_cfg_says_what_pip_has_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    groups = {"ray": "qafe.executors", "models": "qafe.model_sources"}

    def found() -> dict[str, str]:
        return {name: point.value for name, group in groups.items() if (point := entry_point(group, name))}

    noted = found()
    assert noted.keys() == groups.keys()
    monkeypatch.setattr(installation, "entry_points", lambda **_: ())
    assert found() == noted
    assert entry_point("qafe.executors", "none") is None
    monkeypatch.setattr(installation, "NAME", "no-such-project")
    assert re.fullmatch(r"\d+\.\d+\.\d+\+clone", version())
    monkeypatch.setattr(installation, "CLONE", tmp_path)
    assert version() == "unknown+clone"
    assert entry_point("qafe.executors", "ray") is None


def test_a_clone_that_was_never_installed_sweeps_registers_and_scores(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an environment that has all libraries and not the project."""
    links = tmp_path / "links"
    links.mkdir()
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for path in Path(pytest.__file__).parents[1].iterdir():
        if "qafe" not in path.name:
            (links / path.name).symlink_to(path)
    (packages / "libraries.pth").write_text(f"{links}\n")
    python, clone = tmp_path / "venv" / "bin" / "python", tmp_path / "clone"
    for room in ("qafe", "sweeps", "tracking"):
        shutil.copytree(ROOT / room, clone / room)
    shutil.copy(ROOT / "setup.cfg", clone)  # and not what pip has noted beside it
    assert run(python, "-m", "qafe", "--version", clone=clone).stdout == f"qafe-net {version()}+clone\n"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    clip = next((sample_root / "frames").glob("*/*smile*"))
    flags = ["--data-root", str(sample_root), "--preset", "tiny", *QUICK_FLAGS, "--trials", "1"]
    for line in (
        ["sweeps.run", "fusion_search", *flags, "--storage", str(tmp_path / "storage")],
        ["tracking.registry", "register", "--sweep", "fusion_search-1"],
        ["qafe", "score", str(clip), "--model", "models:/qafe-net/1"],
    ):
        done = run(python, "-m", *line, clone=clone)
        assert done.returncode == 0, done.stderr
    assert re.match(r"-?\d\.\d{6} ", done.stdout)
