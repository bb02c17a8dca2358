"""One real server with accounts for all tests of this folder that need one: a start takes seconds."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow import MlflowClient

from tracking import server
from tracking.accounts import ADMIN_PASSWORD_VARIABLE, Accounts
from tracking.database import Database
from tracking.migrate import prepare

from .stores import embedded, free_port

PASSWORDS = {"admin": "an-admins-password", "rita": "a-readers-password", "ed": "an-editors-password",
             "cora": "a-curators-password", "lena": "a-password-of-lena"}  # fmt: skip
ROLES = {"rita": "reader", "ed": "editor", "cora": "curator", "lena": "reader"}
"""For ``lena`` wrong passwords are tried: afterwards the right one is refused for a while too."""


@dataclass(frozen=True)
class Live:
    """A server with accounts that runs."""

    folder: Path
    url: str

    @property
    def home(self) -> Path:
        return self.folder / "mlflow-server"

    @property
    def flags(self) -> list[str]:
        """What names its store to a command."""
        return ["--backend", embedded(self.folder)]

    def become(self, name: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
        """A client that says it is this account."""
        monkeypatch.setenv("MLFLOW_TRACKING_URI", self.url)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS.get(name, "not-a-password"))
        return MlflowClient(self.url)

    def get(self, path: str, name: str = "admin", **more: object) -> requests.Response:
        return requests.get(f"{self.url}{path}", auth=(name, PASSWORDS[name]), timeout=30, **more)  # type: ignore[arg-type]

    def post(self, path: str, body: str, name: str = "ed", method: str = "POST") -> requests.Response:
        """The answer to a body as it stands."""
        headers = {"Content-Type": "application/json"}
        account = (name, PASSWORDS[name])
        return requests.request(method, f"{self.url}{path}", data=body, headers=headers, auth=account, timeout=30)


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, to be copied: MLflow takes seconds to make one."""
    folder = tmp_path_factory.mktemp("schema")
    prepare(Database(embedded(folder)))
    return folder / "mlflow.db"


@pytest.fixture
def place(schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty embedded store, which is MLflow's own default during the test."""
    folder = tmp_path / "a store"
    folder.mkdir()
    shutil.copy(schema, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", embedded(folder))
    mlflow.set_tracking_uri(embedded(folder))
    return folder


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    port = free_port()
    flags = ["--backend", embedded(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ADMIN_PASSWORD_VARIABLE, PASSWORDS["admin"])
        assert server.main(["start", *flags, "--port", str(port), "--auth", "--background"]) == 0
    try:
        people = Accounts(folder / "mlflow-server")
        for name, role in ROLES.items():
            people.add(name, PASSWORDS[name], role)
        yield Live(folder, f"http://127.0.0.1:{port}")
    finally:
        assert server.main(["stop", *flags]) == 0
