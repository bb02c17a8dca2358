"""A sweep as its users run it: a process of its own, real Ray, a real MLflow store."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import QUICK_FLAGS
from tests.tracking.stores import embedded

ROOT = Path(__file__).parents[2]


class Sweep:
    """One ``python -m sweeps.run`` in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        data_root: Path,
        *flags: str,
        uri: str = "",
        storage: Path | None = None,
        bucket: str = "",
        **environment: str,
    ) -> None:
        self.folder = folder
        self.storage = storage or folder
        self.uri = uri or embedded(folder)
        self.environment = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": self.uri} | environment
        self.line = [sys.executable, "-m", "sweeps.run", "fusion_search", "--storage", bucket or str(self.storage)]
        self.line += ["--name", "s-1"]
        self.flags = ["--data-root", str(data_root), "--json", str(folder / "summary.json"), *QUICK_FLAGS, *flags]
        self.log = folder / "sweep.log"

    def start(self, *flags: str, **how: Any) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as out:
            line = [*self.line, *(flags or self.flags)]
            environment = os.environ | self.environment
            return subprocess.Popen(line, cwd=self.folder, env=environment, stdout=out, stderr=out, **how)

    def run(self, *flags: str) -> str:
        process = self.start(*flags)
        assert process.wait(timeout=400) == 0, self.text
        return self.text

    def move_to(self, storage: Path) -> None:
        """The storage is found elsewhere from now on."""
        self.storage.rename(storage)
        self.line[self.line.index(str(self.storage))] = str(storage)
        self.storage = storage

    def steer(self, command: str, *flags: str) -> None:
        """``python -m sweeps.pause`` and the like."""
        line = [sys.executable, "-m", f"sweeps.{command}", "s-1", "--storage", str(self.storage), *flags]
        done = subprocess.run(line, env=os.environ | self.environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def summary(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / "summary.json").read_text())
        return found

    def runs(self) -> dict[str, Run]:
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("fusion_search")
        assert experiment is not None
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    def steps(self, run: Run) -> list[int]:
        return [row.step for row in MlflowClient(self.uri).get_metric_history(run.info.run_id, "spearman")]

    def wait_for(self, pattern: str, timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if re.search(pattern, self.text):
                return
            time.sleep(0.2)
        raise AssertionError(f"{pattern} did not come up in {timeout_s} s:\n{self.text}")

    def spooled(self) -> list[dict[str, object]]:
        spool = self.storage / "s-1" / "tracking.jsonl"
        return [json.loads(line) for line in spool.read_text().splitlines()] if spool.exists() else []

    def wait_for_epoch(self, step: int, timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if any(entry["kind"] == "epoch" and entry["step"] == step for entry in self.spooled()):
                return
            time.sleep(0.1)
        raise AssertionError(f"no trial reached epoch {step}:\n{self.text}")


def family(sweep: Sweep) -> list[psutil.Process]:
    """All processes of a sweep, whoever started them: those that know its tracking store, which is its own, and others
    of their sessions (a process that has given itself a title shows no environment)."""
    alive, ours, own = [], set(), os.getsid(0)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            session, knows = os.getsid(process.pid), process.environ().get("MLFLOW_TRACKING_URI") == sweep.uri
            alive.append((process, session, knows))
            ours |= {session} if knows and session != own else set()
    return [process for process, session, knows in alive if knows or session in ours]


def driver_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The driver of a sweep, which the process that people start has started."""
    [driver] = psutil.Process(process.pid).children()
    return driver


def end(sweep: Sweep) -> None:
    """Ends what a failed test has left."""
    for process in family(sweep):
        with contextlib.suppress(psutil.Error):
            process.kill()


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Ray's trial workers below a sweep's process, known by their class: the method is named only while one runs."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "".join(child.cmdline()[:1]).startswith("ray::QafeTrial"):
                found.append(child)
        except psutil.Error:
            continue
    return found
