"""What goes to MLflow in one request, and which of its answers are final."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import requests
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from .spool import Entry

BATCH = 1000
BATCH_TEXTS = 100
"""MLflow's limits of one request: metrics, params and tags together; params, and tags."""
WAITS = (401, 403, 408, 429, 499)
"""Refusals that may end without a change to what was sent: a password, a right, a busy server."""
Item = Metric | Param | RunTag


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """The items in requests that MLflow takes; of several tags with one name the last."""
    last = {item.key: item for item in items if isinstance(item, RunTag)}
    batch: list[Item] = []
    texts = 0
    for item in items:
        if isinstance(item, RunTag) and last[item.key] is not item:
            continue
        text = not isinstance(item, Metric)
        if len(batch) == BATCH or (text and texts == BATCH_TEXTS):
            yield batch
            batch, texts = [], 0
        batch.append(item)
        texts += text
    if batch:
        yield batch


def refusal(err: BaseException | None) -> bool:
    """Whether the server will never take what it was given: a client error that no waiting ends."""
    status = 0
    if isinstance(err, MlflowException):
        status = int(err.get_http_status_code())
    elif isinstance(err, requests.HTTPError) and err.response is not None:
        status = err.response.status_code
    return 400 <= status < 500 and status not in WAITS


def as_entry(batch: Sequence[Item]) -> Entry:
    """The items as the spool keeps them."""
    return {
        "rows": [[m.key, m.value, m.timestamp, m.step] for m in batch if isinstance(m, Metric)],
        "params": {item.key: item.value for item in batch if isinstance(item, Param)},
        "tags": {item.key: item.value for item in batch if isinstance(item, RunTag)},
    }
