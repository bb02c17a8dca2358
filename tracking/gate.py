"""MLflow's password check, and two rules that MLflow does not have; it runs inside the server (accounts.py names it).

Whoever has an account may create experiments and registered models in MLflow, and manages what he created: a reader
could take the model's name before the group does. Here only those who may edit something create. No experiment and no
trace can name a folder of the server's machine for its artifacts.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from flask import Response, request
from mlflow.protos.service_pb2 import CreateExperiment
from mlflow.server import auth, handlers
from mlflow.utils.mlflow_tags import MLFLOW_ARTIFACT_LOCATION
from mlflow.utils.uri import append_to_uri_path
from werkzeug.datastructures import Authorization

CREATES_EXPERIMENT = "/mlflow/experiments/create"
CREATES = (CREATES_EXPERIMENT, "/mlflow/registered-models/create")
READS_TRACE = "/mlflow/get-trace-artifact"
EDITS = ("EDIT", "MANAGE")
ELSEWHERE = re.compile(r"(?:abfss|b2|gs|https?|mlflow-artifacts|r2|s3|wasbs)://", re.IGNORECASE)
"""How a place begins that is no folder of the server's machine."""


def authenticate() -> Authorization | Response:
    """The account of a request, or the answer that refuses it (401, 403)."""
    account = auth.authenticate_request_basic_auth()
    if isinstance(account, Response):
        return account
    if request.method == "POST" and request.path.endswith(CREATES):
        allowed = _edits(str(account.username))
        if request.path.endswith(CREATES_EXPERIMENT):
            # MLflow reads more spellings of a field and more encodings of a body than Flask: it must be asked.
            allowed = allowed and _elsewhere(handlers._get_request_message(CreateExperiment()).artifact_location)
    else:
        allowed = not request.path.endswith(READS_TRACE) or _in_its_place(request.args.get("request_id", ""))
    return account if allowed else auth.make_forbidden_response()


def _elsewhere(place: str) -> bool:
    """Whether an experiment's artifacts may lie there; no place is MLflow's own choice."""
    return not place or (ELSEWHERE.match(place) is not None and ".." not in unquote(unquote(place)))


def _in_its_place(trace_id: str) -> bool:
    """Whether a trace's files are its experiment's: MLflow follows a tag that who writes the trace can set."""
    store = handlers._get_tracking_store()
    trace = store.get_trace_info(trace_id)
    place = trace.tags.get(MLFLOW_ARTIFACT_LOCATION)
    experiment = store.get_experiment(trace.experiment_id)
    return place in (None, append_to_uri_path(experiment.artifact_location, "traces", trace_id, "artifacts"))


def _edits(name: str) -> bool:
    user = auth.store.get_user(name)
    grants = [grant for role in auth.store.list_user_roles(user.id) for grant in role.permissions]
    return bool(user.is_admin) or any(grant.permission in EDITS for grant in grants)
