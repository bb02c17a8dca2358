"""What a webhook hears of a sweep's end."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qafe.errors import ConfigError, MediaError, QafeError
from sweeps import notify
from sweeps.command import main
from sweeps.notify import check_url, notified, post
from tests.sweeps.test_status import half_done, make_sweep

SUMMARY = {
    "best": {"trial": 4, "best_spearman": 0.7123, "test_spearman": 0.65},
    "luck": {"threshold": 0.4, "p_value": 0.001, "expected_max": 0.2},
}


class Webhook:
    """A server that answers with the given statuses, one after the other, then with 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.heard: list[tuple[str, str, Any]] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.heard.append((self.path, self.headers["Content-Type"], json.loads(body)))
                status = hook.statuses.pop(0) if hook.statuses else 200
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                raise AssertionError("followed a redirection")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/TOKEN"


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    monkeypatch.setattr(notify, "RETRIED_S", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    hook = Webhook()
    threading.Thread(target=hook.server.serve_forever, daemon=True).start()
    yield hook
    hook.server.shutdown()
    hook.server.server_close()


def test_a_finished_sweep(webhook: Webhook, tmp_path: Path) -> None:
    plan = half_done(tmp_path)
    with notified(webhook.url, plan) as outcome:
        outcome.begun, outcome.summary = True, SUMMARY
    [(path, kind, told)] = webhook.heard
    assert (path, kind) == ("/hook/TOKEN", "application/json")
    assert told["state"] == "finished"
    assert told["counts"] == {"finished": 1, "pruned": 1, "failed": 1, "unfinished": 2}
    assert told["best"] == {"trial": 4, "validation_spearman": 0.7123, "test_spearman": 0.65}
    assert told["luck"] == {"threshold": 0.4, "p_value": 0.001}
    assert told["error"] is None
    assert told["text"].startswith("Sweep s-1 finished after ")
    assert told["text"].endswith("Best: trial 4, validation Spearman 0.712, test 0.650.")


@pytest.mark.parametrize(
    ("ended", "state", "error"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (MediaError("/secret/patients/p07/smile.jpg is damaged"), "failed", "MediaError: a clip cannot be read"),
        (QafeError("p07"), "failed", "QafeError: no trial finished, or none can"),
        (RuntimeError("p07"), "failed", "RuntimeError: an unforeseen error"),
    ],
)
def test_a_failure_names_no_file_and_is_passed_on(
    ended: BaseException, state: str, error: str | None, webhook: Webhook, tmp_path: Path
) -> None:
    plan = half_done(tmp_path)

    def drive() -> None:
        with notified(webhook.url, plan) as outcome:
            outcome.begun = True
            raise ended

    with pytest.raises(type(ended)):
        drive()
    [(_, _, told)] = webhook.heard
    assert (told["state"], told["error"]) == (state, error)
    assert told["best"] == {"trial": 0, "validation_spearman": 0.4, "test_spearman": None}
    assert not [word for word in ("p07", "/", "secret", str(tmp_path)) if word in json.dumps(told)]


def test_a_process_that_is_not_the_driver_says_nothing(webhook: Webhook, tmp_path: Path) -> None:
    with pytest.raises(ConfigError), notified(webhook.url, make_sweep(tmp_path)):
        raise ConfigError("it is running already")
    with notified(None, make_sweep(tmp_path, "s-2")) as outcome:
        outcome.begun = True
    assert webhook.heard == []


@pytest.mark.parametrize(
    ("statuses", "heard", "taken"), [([500, 503], 3, True), ([500] * 3, 3, False), ([302] * 3, 3, False)]
)
def test_three_tries(
    statuses: list[int], heard: int, taken: bool, webhook: Webhook, capsys: pytest.CaptureFixture[str]
) -> None:
    webhook.statuses = list(statuses)
    assert post(webhook.url, {"text": "x"}) is taken
    assert len(webhook.heard) == heard
    error = capsys.readouterr().err
    assert "TOKEN" not in error
    line = f"--notify: 127.0.0.1 did not take the message in 3 tries (HTTP {statuses[0]})\n"
    assert error == ("" if taken else line)


def test_nobody_there_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify, "RETRIED_S", 0.01)
    with notified("http://127.0.0.1:9/TOKEN", make_sweep(tmp_path)) as outcome:
        outcome.begun = True
    assert (
        capsys.readouterr().err == "--notify: 127.0.0.1 did not take the message in 3 tries (ConnectionRefusedError)\n"
    )


@pytest.mark.parametrize(
    "url", ["", "hooks.example.org/TOKEN", "ftp://host/TOKEN", "http://", "https://h:x/TOKEN", "http://h/ TOKEN"]
)
def test_a_bad_url_is_refused_before_anything_starts(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="http"):
        check_url(url)
    assert main(["fusion_search", "--notify", url, "--storage", str(tmp_path / "storage")]) == 2
    error = capsys.readouterr().err
    assert "--notify needs an http:// or https:// URL" in error
    assert "TOKEN" not in error
    assert not (tmp_path / "storage").exists()
