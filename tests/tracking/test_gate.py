"""The door of a server with accounts: every route by role, other spellings, guessed passwords, changed models."""

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException

from qafe.errors import TrackingError
from tracking import registry, roles
from tracking.accounts import Accounts
from tracking.connection import connect
from tracking.digest import DIGEST_TAG
from tracking.gate import Gate
from tracking.server import main

from .conftest import PASSWORDS, ROLES, Live
from .stores import embedded, free_port

DOCUMENTED = Path(roles.__file__).with_name("roles.md")
SCORER = """
import mlflow
from mlflow.pyfunc.model import PythonModel

class Two(PythonModel):
    def predict(self, context, model_input, params=None):
        return [2.0]

mlflow.models.set_model(Two())
"""


@pytest.fixture(scope="module")
def page() -> str:
    """The table of the installed MLflow's routes."""
    line = [sys.executable, "-W", "ignore", "-m", "tracking.roles"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def routes(page: str) -> list[tuple[str, str]]:
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "`" in line]
    found = [(row[0].removeprefix("| "), row[1].strip("`")) for row in rows]
    return [*found, *((method, path.replace("/api/", "/ajax-api/", 1)) for method, path in found if "/api/" in path)]


def test_every_route_of_the_installed_mlflow_has_its_role_and_stands_in_the_docs(page: str) -> None:
    assert page.count("\n") > 250
    unknown = [line for line in page.splitlines() if "| None |" in line]
    assert unknown == [], "put these into tracking.roles.ROUTES"
    assert page == DOCUMENTED.read_text(), "python -m tracking.roles > tracking/roles.md"


def test_only_what_is_closed_for_all_is_covered_by_a_pattern() -> None:
    assert {right for right, method, path in roles.rows() if path.endswith("**") or method == "*"} == {"nobody"}
    assert len({(method, path) for _, method, path in roles.rows()}) == len(list(roles.rows()))


def send(live: Live, method: str, path: str, account: str | None, body: bytes | None = None) -> tuple[int, str]:
    """The answer to a path that nobody has tidied on the way."""
    place = urlsplit(live.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    if account:
        headers["Authorization"] = requests.auth._basic_auth_str(account, PASSWORDS[account])
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


@pytest.mark.parametrize("account", [None, *ROLES, "admin"])
def test_each_role_is_refused_on_every_route_that_is_not_its_own(
    live: Live, routes: list[tuple[str, str]], account: str | None
) -> None:
    role = "stranger" if account is None else ROLES.get(account, "admin")
    if account == "lena":
        pytest.skip("wrong passwords are tried for it")
    let_in = 0
    for method, path in routes:
        right = roles.right_of(method, roles.example(path))
        status, text = send(live, method, roles.example(path), account)
        if right in roles.RIGHTS_OF[role]:
            assert status != 401, (method, path)
            let_in += status != 403
        else:
            assert status == (401 if account is None else 403), (method, path, status, text)
    assert let_in >= {"stranger": 1, "reader": 40, "editor": 50, "curator": 60, "admin": 120}[role]


def test_a_route_that_nobody_knows_is_refused_to_all(live: Live) -> None:
    for path in ("/api/2.0/mlflow/experiments/burn", "/api/4.0/mlflow/runs/get", "/metrics", "/ajax-api/2.0/preview/x"):
        assert send(live, "GET", path, "admin")[0] == 403
    assert send(live, "PUT", "/api/2.0/mlflow/runs/get", "admin")[0] == 403


PATHS = [
    "/api/2.0/mlflow/./{0}",
    "/api/2.0/mlflow/%2e/{0}",
    "/api/2.0/mlflow/%2E/{0}",
    "/api/2.0//mlflow/{0}",
    "//api/2.0/mlflow/{0}",
    "/api/2.0/mlflow/x/../{0}",
    "/api/2.0/mlflow/x/%2e%2e/{0}",
    "/api/2.0/mlflow/%252e/{0}",
    "/api/2.0/mlflow/x%5c..%5c{0}",
    "/api/2.0/mlflow/{0}/.",
    "/api/2.0/mlflow/{0}/",
]


@pytest.fixture(scope="module")
def hidden(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An experiment that rita must not see, with a run and a model."""
    with pytest.MonkeyPatch.context() as patch:
        client = live.become("cora", patch)
        experiment = client.create_experiment("hidden")
        run = client.create_run(experiment).info.run_id
        client.log_metric(run, "spearman", 0.5)
        client.log_text(run, "a secret", "notes/secret.txt")
        folder = tmp_path_factory.mktemp("files")
        (folder / "secret.txt").write_text("a secret")
        model = registry.add_version(client, "hidden-model", run, folder, {})
        assert main(["user", *live.flags, "grant", "rita", "experiment:hidden", "DENY"]) == 0
        assert main(["user", *live.flags, "grant", "rita", "model:hidden-model", "DENY"]) == 0
        yield {"experiment": experiment, "run": run, "model": model.source.removeprefix("models:/")}
        assert main(["user", *live.flags, "grant", "rita", "experiment:hidden", "READ"]) == 0
        assert main(["user", *live.flags, "grant", "rita", "model:hidden-model", "READ"]) == 0


def test_who_is_denied_an_experiment_sees_it_by_no_route_and_no_spelling(live: Live, hidden: dict[str, str]) -> None:
    experiment, run, model = hidden["experiment"], hidden["run"], hidden["model"]
    gets = [
        f"experiments/get?experiment_id={experiment}",
        "experiments/get-by-name?experiment_name=hidden",
        "experiments/search?max_results=100",
        f"runs/get?run_id={run}",
        f"metrics/get-history?run_id={run}&metric_key=spearman",
        f"metrics/get-history-bulk?run_id={run}&metric_key=spearman",
        f"metrics/get-history-bulk-interval?run_ids={run}&metric_key=spearman",
        f"artifacts/list?run_id={run}",
        f"logged-models/{model}",
        f"logged-models/{model}/artifacts/directories",
        f"logged-models/{model}/artifacts/files?artifact_file_path=secret.txt",
        "registered-models/get?name=hidden-model",
        "registered-models/search?max_results=100",
        "model-versions/get?name=hidden-model&version=1",
        "model-versions/search?max_results=100",
        "model-versions/get-download-uri?name=hidden-model&version=1",
    ]
    posts = {
        "experiments/search": {"max_results": 100},
        "runs/search": {"experiment_ids": [experiment]},
        "logged-models/search": {"experiment_ids": [experiment]},
        "experiments/search-datasets": {"experiment_ids": [experiment]},
    }
    proxied = f"mlflow-artifacts/artifacts/{experiment}/{run}/artifacts/notes/secret.txt"
    for api in ("/api/2.0/", "/ajax-api/2.0/"):
        asked = [("GET", f"{api}mlflow/{path}", None) for path in gets]
        asked += [("POST", f"{api}mlflow/{path}", json.dumps(body).encode()) for path, body in posts.items()]
        files = [proxied]
        for spelling in ("./", "%2e/", "/", "%2f", "%252e/", "x/../", "x/%2e%2e/", ".//"):
            files += [proxied.replace("artifacts/artifacts/", f"artifacts/artifacts/{spelling}")]
            asked += [
                ("GET", f"{api}mlflow-artifacts/artifacts?path={spelling}{experiment}/{run}/artifacts/notes", None)
            ]
        asked += [("GET", f"{api}{path}", None) for path in files]
        asked += [("GET", f"{api}mlflow-artifacts/artifacts?path={experiment}", None)]
        asked += [("GET", f"{api}mlflow-artifacts/artifacts", None)]
        for method, path, body in asked:
            status, text = send(live, method, path, "rita", body)
            assert "secret" not in text, (path, status, text)
            assert "hidden" not in text, (path, status, text)
            assert run not in text, (path, status, text)
    for path in (f"/get-artifact?run_uuid={run}&path=notes/secret.txt",
                 "/model-versions/get-artifact?name=hidden-model&version=1&path=secret.txt"):  # fmt: skip
        assert send(live, "GET", path, "rita")[0] == 403
    assert send(live, "GET", f"/api/2.0/{proxied}", "cora") == (200, "a secret")


@pytest.mark.parametrize("spelling", PATHS)
def test_another_spelling_of_a_path_leads_nowhere(live: Live, hidden: dict[str, str], spelling: str) -> None:
    for name in (f"runs/get?run_id={hidden['run']}", "users/list", "gateway/secrets/list"):
        path, _, query = name.partition("?")
        for account in ("rita", "admin"):
            status, text = send(live, "GET", spelling.format(path) + (f"?{query}" if query else ""), account)
            assert status == 403, (spelling, text)


def test_guessing_passwords_ends_soon_is_noted_and_tells_no_names(live: Live) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert live.get(path, "cora").status_code == 200
    Accounts(live.home).add("lars", "a-password-of-lars", "reader")
    seen: dict[str, list[float]] = {"lars": [], "a name\nthat nobody has": []}
    for number in range(10):
        for name, taken in seen.items():
            started = time.perf_counter()
            answer = requests.get(f"{live.url}{path}", auth=(name, f"a-wrong-password-{number}"), timeout=30)
            taken.append(time.perf_counter() - started)
            assert answer.status_code == 401
    known, unknown = map(median, seen.values())
    assert 0.5 < known / unknown < 2
    refused = requests.get(f"{live.url}{path}", auth=("lars", "a-password-of-lars"), timeout=30)
    assert refused.status_code == 429
    assert re.fullmatch(r"Too many wrong passwords, wait \d+ s\n", refused.text)
    assert live.get(path, "cora").status_code == 200  # others of the same address are let in
    log = (live.home / "server.log").read_text()
    assert "wrong password or unknown account: 'lars' from 127.0.0.1" in log
    assert "'a name\\nthat nobody has'" in log
    assert "a-wrong-password" not in log


@pytest.fixture(scope="module")
def version(live: Live, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A registered model that scores 2.0, and where its files lie."""
    with pytest.MonkeyPatch.context() as patch:
        client = live.become("cora", patch)
        mlflow.set_tracking_uri(live.url)
        run = client.create_run(client.create_experiment("of a model")).info.run_id
        folder = tmp_path_factory.mktemp("two")
        (folder / "scorer.py").write_text(SCORER)
        mlflow.pyfunc.save_model(str(folder / "model"), python_model=str(folder / "scorer.py"), pip_requirements=[])
        made = registry.add_version(client, "two", run, folder / "model", {})
        model = made.source.removeprefix("models:/")
        place = client.get_logged_model(model).artifact_location.removeprefix("mlflow-artifacts:/")
    return {"model": model, "place": place, "run": run}


@pytest.mark.parametrize("account", ["ed", "cora", "admin"])
def test_nobody_changes_a_finished_models_files(live: Live, version: dict[str, str], account: str) -> None:
    place, model = version["place"], version["model"]
    for api in ("/api/2.0", "/ajax-api/2.0"):
        files = f"{api}/mlflow-artifacts"
        asked = [
            ("PUT", f"{files}/artifacts/{place}/scorer.py", b"planted"),
            ("PUT", f"{files}/artifacts/{place}/one-more.py", b"planted"),
            ("PUT", f"{files}/artifacts/{place}", b"planted"),
            ("DELETE", f"{files}/artifacts/{place}/scorer.py", None),
            ("DELETE", f"{files}/artifacts/{place}", None),
            ("DELETE", f"{files}/artifacts/{place.removesuffix('/artifacts')}", None),
            ("POST", f"{files}/mpu/create/{place}/scorer.py", b'{"path": "x", "num_parts": 1}'),
            ("PATCH", f"{api}/mlflow/logged-models/{model}", json.dumps({"status": "LOGGED_MODEL_PENDING"}).encode()),
            ("DELETE", f"{api}/mlflow/logged-models/{model}", None),
        ]
        for method, path, body in asked:
            assert send(live, method, path, account, body)[0] == 409, (method, path)
        for parent in (place.split("/")[0], place.rsplit("/", 2)[0]):
            assert send(live, "DELETE", f"{files}/artifacts/{parent}", account)[0] == 403
        for spelling in ("./", "%2e/", "x/../", "/", "%252e%252f"):
            path = f"{files}/artifacts/{spelling}{place}/scorer.py"
            assert send(live, "PUT", path, account, b"planted")[0] == 403
    assert mlflow.pyfunc.load_model("models:/two/1").predict([1]) == [2.0]


@pytest.fixture(autouse=True)
def _own_uri(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    live.become("rita", monkeypatch)
    mlflow.set_tracking_uri(live.url)


def test_a_versions_digest_stays_what_it_is(live: Live, version: dict[str, str]) -> None:
    change = {"name": "two", "version": "1", "key": DIGEST_TAG, "value": "0" * 64}
    bodies = [json.dumps(change), json.dumps(json.dumps(change))]
    for body in bodies:
        answer = live.post("/api/2.0/mlflow/model-versions/set-tag", body, "cora")
        assert (answer.status_code, "does not change" in answer.text) == (409, True)
        answer = live.post("/api/2.0/mlflow/model-versions/delete-tag", body, "cora", "DELETE")
        assert answer.status_code == 409
    other = json.dumps(change | {"key": "note", "value": "ours"})
    assert live.post("/api/2.0/mlflow/model-versions/set-tag", other, "cora").status_code == 200


def test_artifacts_lie_where_the_server_was_told() -> None:
    gate = Gate(None, None, places=("s3://bucket/studies/",))  # type: ignore[arg-type]
    for place in ("s3://bucket/studies", "s3://bucket/studies/1", "mlflow-artifacts:/x"):
        assert gate._may_lie_in(place), place
    for place in ("s3://bucket", "s3://bucket/studies-2", "s3://bucket/studies/../x", "s3://bucket/studies/%2e%2e/x",
                  "S3://bucket/studies", "s3:///bucket/studies", "mlflow-artifacts://x/1", "/s3://bucket/studies",
                  "file:///etc", "mlflow-artifacts:/../etc"):  # fmt: skip
        assert not gate._may_lie_in(place), place


@pytest.mark.parametrize("place", ["/srv/other", "file:///srv/other", "s3:/bucket", "https://x/y"])
def test_a_folder_of_the_machine_is_no_place_of_artifacts(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--backend", embedded(tmp_path), "--auth", "--artifact-places", f"s3://bucket/1,{place}"]
    assert main(["start", *flags, "--background", "--port", str(free_port())]) == 2
    assert f"got {place} (--artifact-places)" in capsys.readouterr().err


def test_a_command_after_guessed_passwords_says_so(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{live.url}/api/2.0/mlflow/experiments/search?max_results=1"
    with ThreadPoolExecutor(16) as pool:  # all within the time in which they count
        list(pool.map(lambda number: requests.get(path, auth=("guessed", f"wrong-{number}"), timeout=60), range(16)))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "guessed")
    with pytest.raises(TrackingError, match=r"too many wrong ones from this machine \(429\)"):
        connect(live.url)


def test_a_version_is_of_a_models_own_files(live: Live, version: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip  # noqa: E501
    client = live.become("cora", monkeypatch)
    for source in ("s3://anybodys/model", f"runs:/{version['run']}/model", "file:///etc", "models:/two/1",
                   f"mlflow-artifacts:/{version['place']}"):  # fmt: skip
        with pytest.raises(MlflowException, match="Invalid model version source"):
            client.create_model_version("two", source, version["run"])


@pytest.mark.parametrize("change", ["a line", "one more", "one less", "compiled"])
def test_a_version_whose_files_were_changed_on_the_disk_is_found_before_a_line_of_it_runs(
    live: Live, version: dict[str, str], change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = live.folder / "mlartifacts" / version["place"]
    code, before = place / "scorer.py", (place / "scorer.py").read_bytes()
    ran = tmp_path / "ran"
    planted = {"a line": code, "one more": place / "more.py", "one less": place / "requirements.txt",
               "compiled": place / "__pycache__" / "scorer.cpython-311.pyc"}[change]  # fmt: skip
    kept = planted.read_bytes() if planted.exists() else None
    planted.parent.mkdir(exist_ok=True)
    if change == "one less":
        planted.unlink()
    else:
        planted.write_bytes(before + f"\nopen({str(ran)!r}, 'w')\n".encode())
    try:
        if change == "compiled":  # is not taken along
            assert mlflow.pyfunc.load_model("models:/two/1").predict([1]) == [2.0]
        else:
            for uri in ("models:/two/1", "models:/two/latest", f"models:/{version['model']}"):
                with pytest.raises(TrackingError, match="those of version 1 of two are not"):
                    mlflow.pyfunc.load_model(uri)
            with pytest.raises(TrackingError, match="those of version 1 of two are not"):
                mlflow.artifacts.download_artifacts("models:/two/1/scorer.py", dst_path=str(tmp_path))
            with pytest.raises(TrackingError, match="those of version 1 of two are not"):
                registry.fetch("models:/two/1")
    finally:
        planted.unlink() if kept is None else planted.write_bytes(kept)
    assert not ran.exists()
    assert mlflow.pyfunc.load_model("models:/two/1").predict([1]) == [2.0]


def test_a_backup_of_changed_files_is_restored_and_said(
    live: Live, version: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backup", *live.flags, str(tmp_path / "good")]) == 0
    assert main(["restore", str(tmp_path / "good"), str(tmp_path / "well")]) == 0
    code = live.folder / "mlartifacts" / version["place"] / "scorer.py"
    before = code.read_bytes()
    code.write_bytes(before + b"\n# planted\n")
    try:
        assert main(["backup", *live.flags, str(tmp_path / "bad")]) == 0
    finally:
        code.write_bytes(before)
    capsys.readouterr()
    assert main(["restore", str(tmp_path / "bad"), str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert "version 1 of two" in said
    assert (tmp_path / "new" / "mlflow.db").exists()
    assert embedded(tmp_path / "new")
