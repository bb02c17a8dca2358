"""Who may do what on a server with ``--auth``: every route of MLflow, by the role that it takes.

What is not in `ROUTES` is refused, so that a route of a newer MLflow is closed until somebody has put it here. Over
the resources of a role's routes (this experiment, that model) MLflow's own permissions decide.

``python -m tracking.roles`` prints the table of the installed MLflow's routes by role that `roles.md` holds.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

Right = Literal["anybody", "read", "log", "begin", "curate", "name", "administer", "nobody"]
"""What a route takes: ``log`` is also for who has a grant on an experiment, ``curate`` for who has one on a model."""
Role = Literal["reader", "editor", "curator", "admin"]
RIGHTS_OF: Mapping[str, tuple[Right, ...]] = {
    "stranger": ("anybody",),
    "reader": ("anybody", "read"),
    "editor": ("anybody", "read", "log", "begin"),
    "curator": ("anybody", "read", "log", "begin", "curate", "name"),
    "admin": ("anybody", "read", "log", "begin", "curate", "name", "administer"),
}
PERMISSIONS_OF: Mapping[str, Mapping[str, str]] = {
    "reader": {},
    "editor": {"experiment": "EDIT"},
    "curator": {"experiment": "EDIT", "registered_model": "MANAGE"},
}
"""MLflow's permissions on all resources of a type: an editor logs sweeps, a curator registers and promotes too."""
BY_GRANT: Mapping[str, Right] = {"experiment": "log", "registered_model": "curate"}
"""What a grant to edit one resource of a type adds."""
ROUTES: Mapping[Right, str] = {
    "anybody": """
        GET       /health
        GET       /static-files/<path:path>
    """,
    "read": """
        GET       /
        GET       /build/<path:filename>
        GET       /version
        GET,POST  /graphql
        GET       mlflow/server-info
        GET,POST  mlflow/ui-telemetry
        GET       mlflow/users/current
        GET       mlflow/users/current/permissions
        PATCH     mlflow/users/update-password
        GET       mlflow/experiments/get
        GET       mlflow/experiments/get-by-name
        GET,POST  mlflow/experiments/search
        POST      mlflow/experiments/search-datasets
        POST      /api/2.0mlflow/experiments/search-datasets
        POST      /ajax-api/2.0mlflow/experiments/search-datasets
        GET       mlflow/runs/get
        POST      mlflow/runs/search
        GET       mlflow/metrics/get-history
        GET       mlflow/metrics/get-history-bulk
        GET       mlflow/metrics/get-history-bulk-interval
        GET       mlflow/artifacts/list
        GET       /get-artifact
        GET       mlflow-artifacts/artifacts
        GET       mlflow-artifacts/artifacts/<path:artifact_path>
        GET       mlflow/logged-models/<model_id>
        GET       mlflow/logged-models/<model_id>/artifacts/directories
        GET       mlflow/logged-models/<model_id>/artifacts/files
        POST      mlflow/logged-models/search
        GET       mlflow/registered-models/get
        GET       mlflow/registered-models/search
        GET       mlflow/registered-models/alias
        GET,POST  mlflow/registered-models/get-latest-versions
        GET       mlflow/model-versions/get
        GET       mlflow/model-versions/search
        GET       mlflow/model-versions/get-download-uri
        GET       /model-versions/get-artifact
        POST      mlflow/traces/search
        GET       mlflow/traces
        GET,POST  mlflow/datasets/search
        GET       mlflow/scorers/list
        GET       mlflow/workspaces
    """,
    "log": """
        POST      mlflow/experiments/update
        POST      mlflow/experiments/delete
        POST      mlflow/experiments/restore
        POST      mlflow/experiments/set-experiment-tag
        POST      mlflow/experiments/delete-experiment-tag
        POST      mlflow/runs/create
        POST      mlflow/runs/update
        POST      mlflow/runs/delete
        POST      mlflow/runs/restore
        POST      mlflow/runs/log-metric
        POST      mlflow/runs/log-parameter
        POST      mlflow/runs/log-batch
        POST      mlflow/runs/log-inputs
        POST      mlflow/runs/log-model
        POST      mlflow/runs/outputs
        POST      mlflow/runs/set-tag
        POST      mlflow/runs/delete-tag
        POST      mlflow/logged-models
        PATCH     mlflow/logged-models/<model_id>
        DELETE    mlflow/logged-models/<model_id>
        POST      mlflow/logged-models/<model_id>/params
        PATCH     mlflow/logged-models/<model_id>/tags
        DELETE    mlflow/logged-models/<model_id>/tags/<tag_key>
        PUT       mlflow-artifacts/artifacts/<path:artifact_path>
        DELETE    mlflow-artifacts/artifacts/<path:artifact_path>
        POST      mlflow-artifacts/mpu/create/<path:artifact_path>
        POST      mlflow-artifacts/mpu/complete/<path:artifact_path>
        POST      mlflow-artifacts/mpu/abort/<path:artifact_path>
    """,
    "begin": """
        POST      mlflow/experiments/create
    """,
    "curate": """
        POST      mlflow/model-versions/create
        PATCH     mlflow/model-versions/update
        DELETE    mlflow/model-versions/delete
        POST      mlflow/model-versions/set-tag
        DELETE    mlflow/model-versions/delete-tag
        POST      mlflow/model-versions/transition-stage
        POST      mlflow/registered-models/alias
        DELETE    mlflow/registered-models/alias
        PATCH     mlflow/registered-models/update
        POST      mlflow/registered-models/set-tag
        DELETE    mlflow/registered-models/delete-tag
    """,
    "name": """
        POST      mlflow/registered-models/create
        POST      mlflow/registered-models/rename
        DELETE    mlflow/registered-models/delete
    """,
    "administer": """
        GET       /signup
        POST      mlflow/users/create
        POST      mlflow/users/create-ui
        GET       mlflow/users/get
        GET       mlflow/users/list
        PATCH     mlflow/users/update-admin
        DELETE    mlflow/users/delete
        GET       mlflow/users/permissions/get
        GET       mlflow/users/permissions/list
        POST      mlflow/users/permissions/grant
        POST      mlflow/users/permissions/revoke
        GET       mlflow/users/roles/list
        POST      mlflow/roles/create
        GET       mlflow/roles/get
        GET       mlflow/roles/list
        PATCH     mlflow/roles/update
        DELETE    mlflow/roles/delete
        POST      mlflow/roles/assign
        DELETE    mlflow/roles/unassign
        GET       mlflow/roles/users/list
        POST      mlflow/roles/permissions/add
        GET       mlflow/roles/permissions/list
        PATCH     mlflow/roles/permissions/update
        DELETE    mlflow/roles/permissions/remove
    """,
    # What MLflow has for language models, what makes it call or run something, and ways around `gate`'s look at files.
    "nobody": """
        *         /v1/**
        *         /gateway/**
        *         jobs/**
        *         mlflow/jobs/**
        *         mlflow/assistant/**
        *         mlflow/mcp-servers/**
        *         mlflow/gateway/**
        *         mlflow/gateway-proxy
        *         mlflow/demo/**
        *         mlflow/genai/**
        *         mlflow/issues/**
        *         mlflow/label-schemas/**
        *         mlflow/review-queues/**
        *         mlflow/prompt-optimization/**
        *         mlflow/scorer/**
        *         mlflow/scorers/**
        *         mlflow/datasets/**
        *         mlflow/traces/**
        *         mlflow/unified-traces
        *         mlflow/get-trace-artifact
        *         mlflow/get-online-trace-details
        *         mlflow/runs/create-promptlab-run
        *         mlflow/upload-artifact
        *         mlflow/artifacts/presigned-upload-url
        *         mlflow/artifacts/presigned-download-url
        *         mlflow-artifacts/presigned/**
        *         mlflow/webhooks/**
        *         mlflow/workspaces/**
    """,
}
"""By right, methods and paths; a path without ``/`` at its start is below ``/api/N.0/`` and ``/ajax-api/N.0/``. What
is named wins over what ``**`` covers, and only what is closed for all is covered so."""
PLACEHOLDER = re.compile(r"<[^>]*>|\{[^}]+\}")
HEAD = """# Routes by role

Every route of MLflow {version} on a server with accounts, as `python -m tracking.roles` prints it; what starts with
`/api` is also below `/ajax-api`. A grant on an experiment adds `log` to a reader, one on a model `curate`; over the
resources of a route MLflow's own permissions decide. What is not here is refused.

| method | route | right | {roles} |"""
UNUSUAL = re.compile(r"[%\\\x00-\x1f\x7f]|//|(?:^|/)\.{1,2}(?:/|$)")
"""In a path that has been decoded once: another spelling of a path, or a way to one."""


def rows() -> Iterator[tuple[Right, str, str]]:
    """Right, method and path of each line of `ROUTES`; ``*`` is any method."""
    for right, lines in ROUTES.items():
        for line in lines.split("\n"):
            if line.strip():
                methods, path = line.split()
                yield from ((right, method, path) for method in methods.split(","))


def right_of(method: str, path: str) -> Right | None:
    """What a request's route takes; None for one that nobody has put into `ROUTES`, and for unusual spellings.

    Args:
        path: decoded once, without the server's prefix.
    """
    if UNUSUAL.search(path):
        return None
    wanted = "GET" if method == "HEAD" else method
    return next(
        (right for right, allowed, way in _compiled() if allowed in (wanted, "*") and way.fullmatch(path)), None
    )


def roles_of(right: Right | None) -> list[str]:
    """The roles that have a right."""
    return [role for role, rights in RIGHTS_OF.items() if right in rights]


@cache
def _compiled() -> tuple[tuple[Right, str, re.Pattern[str]], ...]:
    named_first = sorted(rows(), key=lambda row: row[2].endswith("**"))
    return tuple((right, method, _pattern(path)) for right, method, path in named_first)


def _pattern(path: str) -> re.Pattern[str]:
    start = "" if path.startswith("/") else r"/(?:ajax-)?api/[23]\.0/"
    whole, rest = (path.removesuffix("/**"), "(?:/.*)?") if path.endswith("/**") else (path, "")
    parts = (_placeholder(part) if part.startswith("<") else re.escape(part) for part in re.split(r"(<[^>]+>)", whole))
    return re.compile(start + "".join(parts) + rest)


def _placeholder(part: str) -> str:
    return ".+" if part.startswith("<path:") else "[^/]+"


def table(routes: Iterable[tuple[str, str]], version: str) -> str:
    """The routes of an MLflow of a version, methods and paths, as a page of Markdown with their roles."""
    lines = [HEAD.format(version=version, roles=" | ".join(RIGHTS_OF)), "|---|---|---|" + "---|" * len(RIGHTS_OF)]
    for path, method in sorted({(PLACEHOLDER.sub("<>", _api(path)), method) for method, path in routes}):
        right = right_of(method, example(path))
        held = ("yes" if role in roles_of(right) else "" for role in RIGHTS_OF)
        lines.append(f"| {method} | `{path}` | {right} | " + " | ".join(held) + " |")
    return "\n".join(lines) + "\n"


def _api(path: str) -> str:
    return path.replace("/ajax-api/", "/api/", 1)


def example(path: str) -> str:
    """A path of a route, as Flask or FastAPI write it, with something in its placeholders' places."""
    return PLACEHOLDER.sub("1", path)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of the installed MLflow."""
    from .accounts import ADMIN_PASSWORD_VARIABLE, environment

    os.environ.setdefault(ADMIN_PASSWORD_VARIABLE, secrets.token_urlsafe(18))  # else it is told where the password lies
    with tempfile.TemporaryDirectory() as home:  # MLflow makes its accounts before its routes
        own = environment(Path(home)) | {"_MLFLOW_SGI_NAME": "uvicorn"}
        line = [sys.executable, "-W", "ignore", "-m", "tracking.gate"]
        routes = subprocess.run(line, env=os.environ | own, capture_output=True, text=True, check=True).stdout
    found = [(method, path) for method, path in (line.split() for line in routes.splitlines())]
    print(table(found, importlib.metadata.version("mlflow")), end="")
    return 0


assert set(ROUTES) == set(get_args(Right))
if __name__ == "__main__":
    sys.exit(main())
