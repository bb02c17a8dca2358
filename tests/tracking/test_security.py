"""What a server with accounts refuses, asked for over the wire."""

import http.client
import json
import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient

from qafe.errors import TrackingError
from sweeps.command import main as sweep
from tracking import registry
from tracking.accounts import Accounts
from tracking.connection import connect, masked, resolve_uri
from tracking.digest import digest_of
from tracking.runs import SPOOL_FILE, replay
from tracking.server import main

from .conftest import PASSWORDS, Live
from .stores import free_port
from .test_runs import open_tracker

SECRET = "root:x:0:0"


@pytest.mark.parametrize(
    "flags",
    [
        ["--host", "0.0.0.0"],
        ["--host", "::"],
        ["--host", "0.0.0.0", "--allowed-hosts", "tracking:5000"],
        ["--host", "0.0.0.0", "--auth"],
        ["--host", "0.0.0.0", "--auth", "--allowed-hosts", "*"],
        ["--host", "0.0.0.0", "--auth", "--allowed-hosts", " , "],
    ],
)
@pytest.mark.parametrize("command", [[], ["start"], ["start", "--background"]])
def test_others_are_let_in_only_with_accounts_and_names(
    flags: list[str], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = f"sqlite:///{tmp_path}/mlflow.db"
    assert main([*command, "--backend", backend, "--port", str(free_port()), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a server that other machines reach needs --auth and --allowed-hosts")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "/ajax-api/2.0/mlflow/experiments/search?max_results=1",
        "/api/2.0/mlflow-artifacts/artifacts",
        "/get-artifact?path=x&run_uuid=y",
        "/graphql",
        "/version",
    ],
)
def test_without_the_right_password_there_is_nothing(live: Live, path: str) -> None:
    for account in (None, ("lena", "a-wrong-password"), ("nobody", PASSWORDS["rita"]), ("lena", "password1234")):
        assert requests.get(f"{live.url}{path}", auth=account, timeout=30).status_code in (401, 429), account
    assert requests.get(f"{live.url}/health", timeout=30).status_code == 200


def test_another_host_header_is_refused(live: Live) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert live.get(path).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", f"evil.example:{urlsplit(live.url).port}"):
        answer = live.get(path, headers={"Host": host})
        assert answer.status_code == 403
        assert "Host" in answer.text


@pytest.fixture(scope="module")
def champion(live: Live, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the curator's with one version, champion."""
    with pytest.MonkeyPatch.context() as patch:
        client = live.become("cora", patch)
        run = client.create_run(client.create_experiment("of cora")).info
        client.log_text(run.run_id, "weights", "model/weights.txt")
        files = tmp_path_factory.mktemp("files")
        (files / "weights.txt").write_text("weights")
        registry.add_version(client, "qafe-net", run.run_id, files, {})
        registry.promote(client, "qafe-net", "1")
    return run.run_id


def test_a_reader_reads_and_changes_nothing(live: Live, champion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = live.become("rita", monkeypatch)
    assert client.get_model_version_by_alias("qafe-net", "champion").version == "1"
    assert client.get_run(champion).info.status == "RUNNING"
    refusals = [
        lambda: client.set_registered_model_alias("qafe-net", "champion", "1"),
        lambda: client.delete_registered_model_alias("qafe-net", "champion"),
        lambda: client.create_model_version("qafe-net", "runs:/x", champion),
        lambda: client.delete_model_version("qafe-net", "1"),
        lambda: client.set_model_version_tag("qafe-net", "1", "sweep", "mine"),
        lambda: client.log_metric(champion, "best_spearman", 1.0),
        lambda: client.delete_run(champion),
        lambda: client.create_experiment("mine"),
        lambda: client.create_registered_model("mine"),
        lambda: client.create_run("0"),
        lambda: AuthServiceClient(live.url).create_user("eve", "a-password-for-eve"),
        lambda: AuthServiceClient(live.url).update_user_admin("rita", True),
        lambda: AuthServiceClient(live.url).update_user_password("cora", "a-password-of-rita"),
    ]
    for number, change in enumerate(refusals):
        with pytest.raises(MlflowException) as refused:
            change()
        assert refused.value.get_http_status_code() == 403, (number, refused.value)
    with pytest.raises(requests.HTTPError, match="403"):
        client.log_text(champion, "worse", "model/weights.txt")
    assert client.get_model_version_by_alias("qafe-net", "champion").version == "1"


def test_promotion_without_the_right_is_one_line(
    live: Live, champion: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rita", "ed"):
        live.become(name, monkeypatch)
        assert registry.main(["promote", "qafe-net", "1"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: this needs a permission that {name} does not have on {live.url} (403).")
        assert said.count("\n") == 1
    live.become("cora", monkeypatch)
    assert registry.main(["promote", "qafe-net", "1"]) == 0
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with_account = live.url.replace("://", f"://cora:{PASSWORDS['cora']}@")
    assert registry.main(["--tracking-uri", with_account, "list"]) == 0
    assert "champion" in capsys.readouterr().out


def test_a_curator_adds_a_version_and_an_editor_does_not(
    live: Live, champion: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "files" / "artifacts" / "checkpoint"
    weights.mkdir(parents=True)
    (weights / "smile.safetensors").write_text("weights")
    client = live.become("cora", monkeypatch)
    version = registry.add_version(client, "qafe-net", champion, tmp_path / "files", {"sweep": "s-1"})
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert (logged.status, logged.tags.keys()) == ("READY", {"mlflow.modelVersions"})
    assert version.tags == {"sweep": "s-1", "files_sha256": digest_of(tmp_path / "files")}
    fetched = registry.fetch(f"models:/qafe-net/{version.version}")
    assert (fetched / "smile.safetensors").read_text() == "weights"
    with pytest.raises(MlflowException, match="403"):
        registry.add_version(live.become("ed", monkeypatch), "qafe-net", champion, tmp_path / "files", {})


def test_a_grant_and_its_end(live: Live, champion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = live.become("ed", monkeypatch)
    assert main(["user", *live.flags, "grant", "ed", "model:qafe-net", "EDIT"]) == 0
    client.set_registered_model_alias("qafe-net", "candidate", "1")
    assert main(["user", *live.flags, "grant", "ed", "model:qafe-net", "READ"]) == 0
    with pytest.raises(MlflowException, match="403"):
        client.set_registered_model_alias("qafe-net", "candidate", "1")
    assert main(["user", *live.flags, "grant", "rita", "experiment:of cora", "EDIT"]) == 0
    live.become("rita", monkeypatch).log_metric(champion, "note", 1.0)
    assert main(["user", *live.flags, "grant", "rita", "experiment:of cora", "READ"]) == 0
    client = live.become("rita", monkeypatch)
    with pytest.raises(MlflowException, match="403"):
        client.log_metric(champion, "note", 2.0)


TRAVERSALS = [
    "../../../../../../etc/passwd",
    "%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%252e%252e%252f%252e%252e%252f%252e%252e%252fetc%252fpasswd",
    "..%5c..%5c..%5cetc%5cpasswd",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "file:///etc/passwd",
    "file:%2f%2f%2fetc%2fpasswd",
    "....//....//....//etc/passwd",
]


def raw(live: Live, method: str, path: str) -> tuple[int, str]:
    """The answer to a path that nobody has tidied on the way."""
    place = urlsplit(live.url)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    account = requests.auth._basic_auth_str("admin", PASSWORDS["admin"])
    connection.request(method, path, body=b"planted" if method == "PUT" else None, headers={"Authorization": account})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_artifact_path_leads_out_of_the_artifacts(live: Live, champion: str, path: str) -> None:
    assert SECRET in Path("/etc/passwd").read_text()
    places = [
        f"/api/2.0/mlflow-artifacts/artifacts/{path}",
        f"/ajax-api/2.0/mlflow-artifacts/artifacts/{path}",
        f"/get-artifact?run_uuid={champion}&path={path}",
        f"/model-versions/get-artifact?name=qafe-net&version=1&path={path}",
    ]
    for place in places:
        status, text = raw(live, "GET", place)
        assert status >= 400, (place, status)
        assert SECRET not in text
    lists = [f"/api/2.0/mlflow-artifacts/artifacts?path={path}", f"/api/2.0/mlflow/artifacts/list?run_id={champion}&path={path}"]  # fmt: skip  # noqa: E501
    for place in lists:
        assert "passwd" not in raw(live, "GET", place)[1].replace(path, "")


@pytest.mark.parametrize("path", ["../planted", "%2e%2e/planted", "..%2fplanted", "%252e%252e%252fplanted"])
def test_nothing_is_written_outside_of_the_artifacts(live: Live, path: str) -> None:
    assert raw(live, "PUT", f"/api/2.0/mlflow-artifacts/artifacts/{path}")[0] >= 400
    assert not list(live.folder.glob("planted*"))


@pytest.mark.parametrize(
    "place",
    [
        "file:///etc",
        "/etc",
        "etc",
        "FILE:///etc",
        " file:///etc",
        "fi\tle:///etc",
        "/etc/a://b/../..",
        "://etc",
        "x:///etc",
        "dbfs:///etc",
        "mlflow-artifacts:///../etc",
        "mlflow-artifacts:///%2e%2e/etc",
        "s3://anybodys-bucket/studies",
        "mlflow-artifacts://another-host/1",
        "runs:/0/x",
    ],
)
@pytest.mark.parametrize("api", ["api", "ajax-api"])
def test_an_experiment_names_no_folder_of_the_server(live: Live, place: str, api: str) -> None:
    plain = json.dumps({"name": "theirs", "artifact_location": place})
    camel = json.dumps({"name": "theirs", "artifactLocation": place})
    for body in (plain, camel, json.dumps(plain), json.dumps(camel)):
        answer = live.post(f"/{api}/2.0/mlflow/experiments/create", body)
        assert answer.status_code == 403, (body, answer.text)


def test_an_experiment_may_lie_where_the_server_puts_it(live: Live) -> None:
    for number, place in enumerate(({"artifactLocation": "mlflow-artifacts:/studies"}, {"artifact_location": ""}, {})):
        made = live.post("/api/2.0/mlflow/experiments/create", json.dumps({"name": f"ok-{number}"} | place))
        assert made.status_code == 200, made.text
    for body in ("{bad", "[1]", '"a word"', ""):  # what MLflow itself refuses
        assert live.post("/api/2.0/mlflow/experiments/create", body).status_code >= 400, body


def test_a_wrong_password_is_one_line(
    live: Live,
    sample_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    live.become("rita", monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-password")
    with pytest.raises(TrackingError, match=r"refused rita \(401\). Set MLFLOW_TRACKING_USERNAME and") as refused:
        connect(live.url)
    assert "a-wrong-password" not in str(refused.value)
    assert sweep(["fusion_search", "--data-root", str(sample_root), "--storage", str(tmp_path / "storage")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: the tracking server must know name and password")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_logs_with_an_account_of_its_environment(
    live: Live, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = live.become("ed", monkeypatch)
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    uri = resolve_uri(live.url.replace("://", f"://ed:{PASSWORDS['ed']}@"))
    assert uri == live.url
    tracker = open_tracker(tmp_path, uri)
    tracker.trial_started("a", 0, {"train.lr": 0.1})
    tracker.epoch("a", 1, {"spearman": 0.5})
    tracker.trial_ended("a", "finished", folder=None)
    tracker.sweep_ended("finished")
    assert tracker.close() == 0
    run = client.get_run(tracker.run_ids()["a"])
    assert (run.info.status, run.data.metrics["spearman"]) == ("FINISHED", 0.5)
    assert all(PASSWORDS["ed"].encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_credentials_of_the_users_file_are_enough(live: Live, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / ".mlflow"
    folder.mkdir()
    (folder / "credentials").write_text(f"[mlflow]\nmlflow_tracking_username = ed\nmlflow_tracking_password = {PASSWORDS['ed']}\n")  # fmt: skip  # noqa: E501
    monkeypatch.setenv("HOME", str(tmp_path))
    connect(live.url)
    (folder / "credentials").unlink()
    with pytest.raises(TrackingError, match="401"):
        connect(live.url)


def test_a_password_is_in_no_log_file_and_no_list_of_processes(live: Live) -> None:
    files = [path for path in live.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"mlflow.db", "server.log", "server.json", "accounts.db", "accounts.ini"}
    for path in files:
        content = path.read_bytes()
        assert not any(password.encode() in content for password in PASSWORDS.values()), path
    for path in live.home.iterdir():
        if path.name in ("accounts.db", "flask.key", "server.log"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(live.home.stat().st_mode) == 0o700
    processes = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid())]
    lines = []
    for path in processes:
        try:
            lines.append(path.read_bytes())
        except OSError:
            continue  # it ended
    assert any(b"mlflow" in line for line in lines)
    assert not any(password.encode() in line for line in lines for password in PASSWORDS.values())


@pytest.mark.parametrize(
    "uri", ["http://ana:pass%40word-9@127.0.0.1:{port}", "postgresql://ana:pass%40word-9@127.0.0.1:{port}/mlflow"]
)
def test_the_uris_password_is_in_no_message(
    uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD"):
        monkeypatch.setenv(name, "")  # set by what is tested: undone after the test
    away = uri.format(port=free_port())
    with pytest.raises(TrackingError) as failed:
        connect(away)
    tracker = open_tracker(tmp_path, away)
    tracker.close(patience_s=1.0)
    with pytest.raises(TrackingError) as unsent:
        replay(tmp_path / SPOOL_FILE)
    said = f"{failed.value} {unsent.value} {caplog.text}"
    assert "127.0.0.1" in said
    assert "pass" not in said.replace("password", "").replace("passwd", "")


def test_what_others_say_is_masked() -> None:
    assert (
        masked("API request to http://ana:geheim@host:1/api failed")
        == "API request to http://ana:***@host:1/api failed"
    )
    assert masked("postgresql://ana:ge@heim@host/db?sslmode=require") == "postgresql://ana:***@host/db?sslmode=require"
    assert (
        masked("postgresql://host/db?user=ana&password=geheim&x=1") == "postgresql://host/db?user=ana&password=***&x=1"
    )
    assert masked("http://host:5000/models:/qafe-net@champion") == "http://host:5000/models:/qafe-net@champion"


def test_accounts_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip  # noqa: E501
    import io

    flags = ["--backend", f"sqlite:///{tmp_path}/mlflow.db"]

    def user(*words: str, stdin: str = "") -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return main(["user", *flags, *words])

    assert user("add", "otto", "--role", "admin", stdin="a-long-password-1\n") == 0
    assert user("add", "rita", stdin="short\n") == 2
    assert "MLflow must allow the account" in capsys.readouterr().err
    assert user("add", "rita", "--generate") == 0
    password = capsys.readouterr().out.strip()
    assert len(password) >= 20
    people = Accounts(tmp_path / "mlflow-server")
    assert people._store.authenticate_user("rita", password)
    assert user("add", "rita", "--generate") == 2
    assert "already exists" in capsys.readouterr().err
    assert user("passwd", "rita", stdin="another-password-2\n") == 0
    assert people._store.authenticate_user("rita", "another-password-2")
    assert not people._store.authenticate_user("rita", password)
    assert user("remove", "otto") == 2
    assert "otto is the last one" in capsys.readouterr().err
    assert user("grant", "rita", "model:qafe-net", "EDIT") == 0
    assert user("grant", "rita", "qafe-net", "EDIT") == 2
    assert user("grant", "nobody", "model:*", "EDIT") == 2
    capsys.readouterr()
    assert user("list") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["name", "role", "grants"], ["otto", "admin"], ["rita", "reader", "registered_model:qafe-net=EDIT"]]
    assert user("remove", "rita") == 0
    assert not people._store.has_user("rita")


def test_the_first_administrators_password_is_made_and_kept_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip  # noqa: E501
    from tracking.accounts import environment

    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD", raising=False)
    monkeypatch.delenv("MLFLOW_FLASK_SERVER_SECRET_KEY", raising=False)
    first = environment(tmp_path / "home")
    kept = tmp_path / "home" / "admin.password"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    password = kept.read_text().strip()
    assert len(password) >= 20
    people = Accounts(tmp_path / "home")
    assert people.administrators() == ["admin"]
    assert people._store.authenticate_user("admin", password)
    assert environment(tmp_path / "home") == first
    assert kept.read_text().strip() == password
    assert password not in (tmp_path / "home" / "accounts.ini").read_text()
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "password1234")
    with pytest.raises(TrackingError):
        environment(tmp_path / "other")
