"""docker/: what its files promise, and (pytest -m docker) the stack built and run for real."""

import base64
import configparser
import fnmatch
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
FILES = ROOT / "docker"
IMAGE = "qafe-net:test"
SWEEP = "docker-test"
PASSWORD = "a-password-for-tests"


def compose_file(name: str = "compose.yaml") -> dict[str, Any]:
    parsed = yaml.safe_load((FILES / name).read_text())
    assert parsed["services"]
    return dict(parsed)


def dockerfile() -> list[str]:
    """The instructions, each on one line."""
    text = re.sub(r"^#.*\n", "", (FILES / "Dockerfile").read_text(), flags=re.M)
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Target -> the whole mount, of short-form volumes whose source may be ${NAME:-volume}."""
    return {re.sub(r"\$\{.*?\}", "source", mount).split(":")[1]: mount for mount in service.get("volumes", [])}


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [port for service in compose_file()["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_server_answers_to_the_name_that_the_sweep_calls() -> None:
    services = compose_file()["services"]
    (hosts,) = [word for word in services["tracking"]["command"] if word.startswith("--allowed-hosts=")]
    called = urlsplit(services["sweep"]["environment"]["MLFLOW_TRACKING_URI"]).netloc
    patterns = hosts.removeprefix("--allowed-hosts=").split(",")
    for name in (called, "localhost:5000", "127.0.0.1:49152"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
    assert not any(fnmatch.fnmatch("elsewhere.example:5000", pattern) for pattern in patterns)


def test_the_server_asks_for_the_password_that_the_sweep_gives() -> None:
    services = compose_file()["services"]
    assert "--auth" in services["tracking"]["command"]
    password = services["tracking"]["environment"]["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert password == services["sweep"]["environment"]["MLFLOW_TRACKING_PASSWORD"]
    assert password.startswith("${QAFE_PASSWORD:?")  # no password of everybody's


def test_data_and_key_are_the_sweeps_alone() -> None:
    services = compose_file()["services"]
    sweep, tracking = mounts(services["sweep"]), mounts(services["tracking"])
    assert sweep["/data"].endswith(":ro")
    assert str(Path(services["sweep"]["environment"]["QAFE_PSEUDONYM_KEY_FILE"]).parent) in sweep
    assert not set(sweep) & set(tracking)
    networks = compose_file()["networks"]
    assert all(networks[name]["internal"] for name in services["sweep"]["networks"])


def test_every_volume_is_mounted_over_a_folder_of_the_user() -> None:
    """A new volume over a folder that the image lacks belongs to root, and nothing could be written to it."""
    (made,) = [line for line in dockerfile() if "install --directory" in line]
    targets = [target for service in compose_file()["services"].values() for target in mounts(service)]
    assert len(targets) >= 5
    assert set(targets) <= set(made.split())


def test_the_image_gets_every_package_and_only_files_that_exist() -> None:
    copied = {word for line in dockerfile() if line.startswith("COPY ") for word in line.split()[1:-1]}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {name.rstrip("*") for name in setup["options.packages.find"]["include"].split()}
    assert packages
    assert packages <= copied
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_the_gpu_override_changes_services_that_exist() -> None:
    assert set(compose_file("compose.gpu.yaml")["services"]) <= set(compose_file()["services"])


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A running compose project of its own, with one sweep done."""

    compose: list[str]
    environment: dict[str, str]
    url: str

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.compose, *arguments], env=self.environment, capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def python(self, code: str) -> Any:
        """What the code prints as JSON in the sweep's container."""
        return json.loads(self("run", "--rm", "-T", "--no-deps", "sweep", "python", "-c", code).stdout)


def _answers(*command: str, timeout_s: float = 60) -> bool:
    if shutil.which(command[0]) is None:
        return False
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=timeout_s).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    if not _answers("docker", "info"):
        pytest.skip("no Docker engine answers (docker info)")
    command = ["docker", "compose"] if _answers("docker", "compose", "version") else ["docker-compose"]
    if not _answers(*command, "version"):
        pytest.skip("no compose command: neither docker compose nor docker-compose")
    base = dockerfile()[0].split()[1]
    if not _answers("docker", "image", "inspect", base) and not _answers("docker", "pull", base, timeout_s=300):
        pytest.skip(f"no base image {base}, and no registry to pull it from")
    port = _free_port()
    arguments = f"--trials 2 --set train.epochs=2 --name {SWEEP}"
    environment = {name: value for name, value in os.environ.items() if name not in ("STUDY", "QAFE_DATA", "QAFE_SHM")}
    environment |= {"QAFE_PASSWORD": PASSWORD, "QAFE_IMAGE": IMAGE, "QAFE_PORT": str(port), "ARGS": arguments}
    project = f"qafe-test-{secrets.token_hex(4)}"
    stack = Stack(
        compose=[*command, "-f", str(FILES / "compose.yaml"), "-p", project],
        environment=environment,
        url=f"http://127.0.0.1:{port}",
    )
    try:
        stack("build", "tracking")
        stack("up", "-d", "tracking")
        stack("run", "--rm", "-T", "sweep")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
            yield stack
    finally:
        stack("down", "-v", check=False)


def on_docker(test: Any) -> Any:
    return pytest.mark.docker(pytest.mark.timeout(1800)(test))


def _runs(client: MlflowClient) -> list[Any]:
    experiments = [found.experiment_id for found in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`qafe.sweep` = '{SWEEP}'"))


@on_docker
def test_a_sweep_is_on_the_server_with_its_trials(stack: Stack) -> None:
    client = MlflowClient(stack.url)
    runs = _runs(client)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 3
    assert len(children) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("best_spearman" in run.data.metrics for run in children)


@on_docker
def test_artifacts_come_through_the_server(stack: Stack, tmp_path: Path) -> None:
    client = MlflowClient(stack.url)
    run = next(run for run in _runs(client) if "best_spearman" in run.data.metrics)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    folder = Path(client.download_artifacts(run.info.run_id, "checkpoint", str(tmp_path)))
    assert list(folder.glob("*.safetensors"))


def _status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as err:
        return err.code


@on_docker
@pytest.mark.parametrize(("host", "status"), [("localhost:5000", 200), ("elsewhere.example:5000", 403)])
def test_the_server_answers_only_to_its_names(stack: Stack, host: str, status: int) -> None:
    request = urllib.request.Request(
        f"{stack.url}/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": host}
    )
    assert _status(request) == (401 if status == 200 else status)
    request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode())
    assert _status(request) == status


@on_docker
def test_the_image_is_lean_and_its_user_is_not_root(stack: Stack) -> None:
    found = stack.python(
        "import cv2, glob, importlib.metadata as m, json, os, shutil, subprocess\n"
        "print(json.dumps(dict(uid=os.getuid(), git=bool(shutil.which('git')),"
        " pip=subprocess.run(['python', '-m', 'pip', 'check'], capture_output=True, text=True).stdout,"
        " opencv=[d.name for d in m.distributions() if d.name.startswith('opencv')],"
        " left=glob.glob('/build/*/', recursive=True), write=os.access('/data', os.W_OK))))"
    )
    assert found["uid"] != 0
    assert found["git"]
    assert found["opencv"] == ["opencv-python-headless"]
    assert {Path(folder).name for folder in found["left"]} <= {"qafe", "sweeps", "tracking"}
    assert "No broken requirements" in found["pip"]
    assert not found["write"]


@on_docker
def test_runs_outlive_the_containers(stack: Stack) -> None:
    before = sorted(run.info.run_id for run in _runs(MlflowClient(stack.url)))
    stack("down")
    stack("run", "--rm", "-T", "sweep", *shlex.split("python -m tracking.registry list"))  # waits for the server
    assert sorted(run.info.run_id for run in _runs(MlflowClient(stack.url))) == before
    assert len(before) == 3
