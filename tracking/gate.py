"""MLflow's password check, and two rules that MLflow does not have; it runs inside the server (accounts.py names it).

Whoever has an account may create experiments and registered models in MLflow, and manages what he created: a reader
could take the model's name before the group does. Here only those who may edit something create. An experiment cannot
name a folder of the server's machine for its artifacts.
"""

from __future__ import annotations

from flask import Response, request
from mlflow.server import auth
from werkzeug.datastructures import Authorization

CREATES = ("/mlflow/experiments/create", "/mlflow/registered-models/create")
EDITS = ("EDIT", "MANAGE")


def authenticate() -> Authorization | Response:
    """The account of a request, or the answer that refuses it (401, 403)."""
    account = auth.authenticate_request_basic_auth()
    if isinstance(account, Response) or request.method != "POST" or not request.path.endswith(CREATES):
        return account
    body = request.get_json(silent=True)
    place = body.get("artifact_location") if isinstance(body, dict) else None
    if place and (not isinstance(place, str) or "://" not in place or place.lower().startswith("file:")):
        return auth.make_forbidden_response()
    return account if _edits(str(account.username)) else auth.make_forbidden_response()


def _edits(name: str) -> bool:
    user = auth.store.get_user(name)
    grants = [grant for role in auth.store.list_user_roles(user.id) for grant in role.permissions]
    return bool(user.is_admin) or any(grant.permission in EDITS for grant in grants)
