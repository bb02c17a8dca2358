"""Tells a URL how a sweep ended: one POST of one JSON object, which webhooks of chat programs understand, too.

The object names no patient, path or data file. The URL may hold a token: it is kept in memory alone and never printed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qafe import errors
from qafe.errors import ConfigError, QafeError

from .progress import duration, progress_of
from .study import own_trials, read_study

if TYPE_CHECKING:
    from .plan import Plan

TIMEOUT_S = 10.0
TRIES = 3
RETRIED_S = 1.0
"""Before the second try, and twice that before the third."""
ERRORS: dict[type[BaseException], str] = {
    errors.ManifestError: "the dataset is not what its tables say",
    errors.MediaError: "a clip cannot be read",
    errors.CheckpointError: "a checkpoint cannot be read",
    errors.TrackingError: "the tracking server cannot do what was asked",
    errors.ConfigError: "it cannot go on as it was planned",
    QafeError: "no trial finished, or none can",
    MemoryError: "the driver ran out of memory",
    OSError: "the disk or the network failed",
}
"""Said instead of a message, which may name a file: the first class that fits."""


@dataclass
class Outcome:
    """What a sweep has come to.

    Attributes:
        begun: whether this process is its driver; somebody else tells what becomes of it otherwise.
        summary: `report.sum_up`'s, if it got that far.
    """

    begun: bool = False
    summary: dict[str, Any] | None = None


def check_url(url: str) -> None:
    """Refuses what cannot be posted to.

    Raises:
        ConfigError: it is no http or https URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        good = good and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        good = False
    if not good:
        raise ConfigError("--notify needs an http:// or https:// URL (not shown, it may hold a token). Correct it.")


@contextlib.contextmanager
def notified(url: str | None, plan: Plan) -> Iterator[Outcome]:
    """Tells the URL how the block ended, and passes on whatever ended it."""
    outcome, started = Outcome(), time.monotonic()
    ended: BaseException | None = None
    try:
        yield outcome
    except BaseException as err:
        ended = err
        raise
    finally:
        if url is not None and outcome.begun:
            with contextlib.suppress(KeyboardInterrupt):  # people who do not want to wait for it
                try:
                    post(url, message(plan, outcome, ended, time.monotonic() - started))
                except Exception as err:  # a sweep that has ended well has ended well
                    print(f"--notify: nobody was told ({type(err).__name__})", file=sys.stderr)


def message(plan: Plan, outcome: Outcome, ended: BaseException | None, seconds: float) -> dict[str, Any]:
    """The JSON object about a sweep that has ended.

    Args:
        ended: what was raised.
        seconds: that its driver ran.
    """
    state, error = "finished", None
    if isinstance(ended, KeyboardInterrupt):
        state = "interrupted"
    elif ended is not None:
        said = next((text for kind, text in ERRORS.items() if isinstance(ended, kind)), "an unforeseen error")
        state, error = "failed", f"{type(ended).__name__}: {said}"
    summary = outcome.summary or {}
    study = read_study(Path(plan.folder), plan.name, plan.study_storage)
    now = progress_of(own_trials(study) if study else [], planned=plan.trials, epochs=0, pace=None)
    best: dict[str, Any] | None = None
    if summary:
        found = summary["best"]
        best = {"trial": found["trial"], "validation_spearman": found["best_spearman"],
                "test_spearman": found["test_spearman"]}  # fmt: skip
    elif now.best is not None:
        best = {"trial": now.best[0], "validation_spearman": now.best[1], "test_spearman": None}
    luck = summary.get("luck")
    counts = {name: count for name, count in now.counts.items() if name != "running"}
    counts["unfinished"] = plan.trials - now.ended
    return {
        "text": _text(plan.name, state, error, counts, best, seconds),
        "sweep": plan.name,
        "study": plan.study,
        "state": state,
        "counts": counts,
        "best": best,
        "luck": {"threshold": luck["threshold"], "p_value": luck["p_value"]} if luck else None,
        "seconds": round(seconds, 1),
        "error": error,
    }


def _text(
    name: str, state: str, error: str | None, counts: dict[str, int], best: dict[str, Any] | None, seconds: float
) -> str:
    line = f"Sweep {name} {'was interrupted' if state == 'interrupted' else state} after {duration(seconds)}"
    line += f" ({error})" if error else ""
    if trials := ", ".join(f"{count} {kind}" for kind, count in counts.items() if count):
        line += f": {trials}"
    if best:
        line += f". Best: trial {best['trial']}, validation Spearman {best['validation_spearman']:.3f}"
        if best["test_spearman"] is not None:
            line += f", test {best['test_spearman']:.3f}"
    return line + "."


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow with a GET, and nobody would have been told."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(url: str, content: dict[str, Any]) -> bool:
    """Posts a JSON object, three times at most; says in one line if nobody took it."""
    request = urllib.request.Request(
        url,
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "qafe-net"},
    )
    opener = urllib.request.build_opener(_NoRedirect)
    why = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(attempt * RETRIED_S)
        try:
            with opener.open(request, timeout=TIMEOUT_S):
                return True
        except urllib.error.HTTPError as err:
            why = f"HTTP {err.code}"
        except Exception as err:  # http.client, ssl and sockets raise almost anything
            reason = getattr(err, "reason", err)
            why = type(reason).__name__ if isinstance(reason, BaseException) else type(err).__name__
    host = urllib.parse.urlsplit(url).hostname
    print(f"--notify: {host} did not take the message in {TRIES} tries ({why})", file=sys.stderr)
    return False
