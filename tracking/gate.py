"""The door of a server with accounts: an ASGI application around MLflow's (``mlflow server --app-name qafe``).

MLflow decides who may change this experiment or that model. Here, before it: each route takes a role (roles.py),
whatever is unknown or spelled unusually is refused, wrong passwords are few and take as long for names that exist as
for others, a finished model's files stay what they are, and artifacts lie where the server was told.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from urllib.parse import parse_qsl

from fastapi.routing import APIRoute
from flask import Flask
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.protos.model_registry_pb2 import DeleteModelVersionTag, SetModelVersionTag
from mlflow.protos.service_pb2 import CreateExperiment
from mlflow.server import app as flask_app
from mlflow.server import auth, handlers
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from werkzeug.security import check_password_hash, generate_password_hash

from .accounts import PLACES_VARIABLE
from .digest import DIGEST_TAG
from .roles import BY_GRANT, RIGHTS_OF, UNUSUAL, Right, right_of

logger = logging.getLogger("uvicorn.error")  # the one that the server's log shows with its time
OWN_SCHEME = "mlflow-artifacts"
EDITS = ("EDIT", "MANAGE")
PATHS = ("path", "artifact_file_path", "artifact_directory_path")
"""Query parameters that name a file."""
TRIES = 10
TRIES_OF_ADDRESS = 100
WINDOW_S = 60.0
"""So many wrong passwords are looked at within so many seconds: for one name, and for all names, of one address."""
SMALL_BYTES = 1_000_000
"""More than a request has that is looked into."""
DRAINED_BYTES = 64_000_000
"""So much of a refused request is read before it is answered."""
MODEL_FILE = re.compile(r"(?:^|/)models/(?P<model>m-[0-9a-f]+)(?:/|$)")
RUN_FILE = re.compile(r"(?:^|/)[0-9a-f]{32}/artifacts(?:/|$)")
ARTIFACT_PATH = re.compile(
    r"/(?:ajax-)?api/2\.0/mlflow-artifacts/(?:artifacts|mpu/(?:create|complete|abort))/(?P<file>.+)"
)
LOGGED_MODEL = re.compile(r"/(?:ajax-)?api/2\.0/mlflow/logged-models/(?P<model>[^/]+)(?:/params)?")
BODY = re.compile(r"/(?:ajax-)?api/2\.0/mlflow/(experiments/create|model-versions/(?:set|delete)-tag)")
"""What is looked into before MLflow gets it."""


class Refused(Exception):
    """A request goes no further.

    Args:
        status: of HTTP.
        why: one line for the client.
        headers: of the answer.
    """

    def __init__(self, status: int, why: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.headers = headers or {}


class _Body:
    """What a request's body is received from; it can be read before it is handed on."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._ended = False

    async def __call__(self) -> Message:
        return self._kept.pop(0) if self._kept else await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._ended = not message.get("more_body", False)
        return message

    async def read(self) -> bytes:
        """All of it."""
        while not self._ended:
            self._kept.append(await self._next())
            if sum(len(message.get("body", b"")) for message in self._kept) > SMALL_BYTES:
                raise Refused(413, "The request is too long")
        return b"".join(message.get("body", b"") for message in self._kept)

    async def drain(self) -> None:
        """Reads what nobody wants: a client that still sends would see its connection end, and no answer."""
        left = DRAINED_BYTES
        while left > 0 and not self._ended:
            left -= len((await self._next()).get("body", b""))


class Gate:
    """Lets through what an account's role allows.

    Args:
        app: MLflow, with its own permissions.
        flask_app: in whose context MLflow reads a request.
        prefix: the sub-path that the server is at.
        places: where artifacts may lie beside the server's own place; each ends in ``/``.
    """

    def __init__(self, app: ASGIApp, flask_app: Flask, prefix: str = "", places: tuple[str, ...] = ()) -> None:
        self._app = app
        self._flask_app = flask_app
        self._prefix = prefix.rstrip("/")
        self._places = (f"{OWN_SCHEME}:/", *places)
        self._tries: dict[tuple[str, str], deque[float]] = defaultdict(deque)
        self._nobody = generate_password_hash("the password of nobody")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http" or scope["method"] == "OPTIONS":  # what a browser asks before it asks
            await self._app(scope, receive, send)
        else:
            body = _Body(receive)
            try:
                await self._let_in(scope, body)
            except Refused as refused:
                await body.drain()
                answer = PlainTextResponse(f"{refused}\n", refused.status, refused.headers)
                await answer(scope, receive, send)
            else:
                await self._app(scope, body, send)

    async def _let_in(self, scope: Scope, body: _Body) -> None:
        """Returns where MLflow may have the request.

        Raises:
            Refused: the request is not for this account, or for nobody.
        """
        method, path = scope["method"], scope["path"]
        if self._prefix and path.startswith(f"{self._prefix}/"):
            path = path.removeprefix(self._prefix)
        right = right_of(method, path)
        if right == "anybody":
            return
        name, password = _credentials(scope)
        rights = await asyncio.to_thread(self._rights, name, password, (scope.get("client") or ("",))[0])
        if right not in rights:
            raise Refused(403, "Permission denied")
        query = scope.get("query_string", b"").decode("latin-1")
        named = [value for key, value in parse_qsl(query, keep_blank_values=True) if key in PATHS]
        if any(UNUSUAL.search(value) or value.startswith("/") for value in named):
            raise Refused(403, "A path is written plainly, without . .. // % and \\.")
        if method not in ("GET", "HEAD"):
            await asyncio.to_thread(self._check_files, method, path)
            if method in ("POST", "DELETE") and BODY.fullmatch(path):
                await asyncio.to_thread(self._check_body, scope, path, await body.read())

    def _rights(self, name: str, password: str, address: str) -> frozenset[Right]:
        """What an account may.

        Raises:
            Refused: there is no such account, the password is another one, or too many were tried.
        """
        cache = auth._USER_AUTH_CACHE
        if cache is None or auth._auth_cache_key(name, password) not in cache:
            self._check_password(name, password, address)
        try:
            user = auth.store.get_user(name)
        except MlflowException as err:  # just deleted
            raise _unknown() from err
        if user.is_admin:
            return frozenset(RIGHTS_OF["admin"])
        rights = set(RIGHTS_OF["reader"])
        for role in auth.store.list_user_roles(user.id):
            if role.name in RIGHTS_OF:
                rights.update(RIGHTS_OF[role.name])
            else:
                found = [BY_GRANT.get(grant.resource_type) for grant in role.permissions if grant.permission in EDITS]
                rights.update(right for right in found if right)
        return frozenset(rights)

    def _check_password(self, name: str, password: str, address: str) -> None:
        now = time.monotonic()
        mine, all_of_address = self._tries[name, address], self._tries["", address]
        for tries, most in ((mine, TRIES), (all_of_address, TRIES_OF_ADDRESS)):
            while tries and tries[0] < now - WINDOW_S:
                tries.popleft()
            if len(tries) >= most:
                wait_s = int(tries[0] + WINDOW_S - now) + 1
                # Without Retry-After: MLflow's client would wait for it and say nothing.
                raise Refused(429, f"Too many wrong passwords, wait {wait_s} s")
        if not auth.store.has_user(name):
            check_password_hash(self._nobody, password)  # who asks cannot tell by the time that there is no such name
        elif auth._authenticate_cached(name, password):
            self._tries.pop((name, address), None)
            return
        mine.append(now)
        all_of_address.append(now)
        for key in [key for key, tries in self._tries.items() if not tries or tries[-1] < now - WINDOW_S]:
            del self._tries[key]
        logger.warning("wrong password or unknown account: %r from %s", name[:100], address)
        raise _unknown()

    def _check_files(self, method: str, path: str) -> None:
        """Files of a finished model stay as they are, and so does that it is finished, as a version may be of it."""
        if file := ARTIFACT_PATH.fullmatch(path):
            if found := MODEL_FILE.search(file["file"]):
                self._check_unfinished(found["model"])
            elif not RUN_FILE.search(file["file"]):
                raise Refused(403, "Files are of a run, or of a model that is not finished")
        elif (found := LOGGED_MODEL.fullmatch(path)) and (method != "DELETE" or self._has_version(found["model"])):
            self._check_unfinished(found["model"])

    def _check_unfinished(self, model: str) -> None:
        try:
            status = handlers._get_tracking_store().get_logged_model(model, allow_deleted=True).status
        except MlflowException:
            return  # MLflow says so itself
        if status != LoggedModelStatus.PENDING:
            raise Refused(409, f"A finished model does not change, {model} is {status}. Log another one")

    def _has_version(self, model: str) -> bool:
        store = handlers._get_model_registry_store()
        return bool(store.search_model_versions(f"source_path = 'models:/{model}'", max_results=1))

    def _check_body(self, scope: Scope, path: str, body: bytes) -> None:
        """Looks into a request as MLflow reads it, which knows more spellings and encodings than Flask."""
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        query = scope.get("query_string", b"").decode("latin-1")
        with self._flask_app.test_request_context(
            path=path, method=scope["method"], headers=headers, data=body, query_string=query
        ):
            try:
                if path.endswith("experiments/create"):
                    place = handlers._get_request_message(CreateExperiment()).artifact_location
                    if place and not self._may_lie_in(place):
                        raise Refused(
                            403, "An experiment's artifacts lie where the server was told (--artifact-places)"
                        )
                else:
                    message = SetModelVersionTag() if path.endswith("/set-tag") else DeleteModelVersionTag()
                    if handlers._get_request_message(message).key == DIGEST_TAG:
                        raise Refused(409, f"A version's {DIGEST_TAG} does not change")
            except MlflowException as err:
                raise Refused(400, str(err).splitlines()[0][:300]) from err

    def _may_lie_in(self, place: str) -> bool:
        scheme, _, way = place.partition(":")
        plain = not UNUSUAL.search(way if scheme == OWN_SCHEME else way.removeprefix("//"))
        return plain and any(f"{place}/".startswith(allowed) for allowed in self._places)


def create_app() -> Gate:
    """The server's application; MLflow's configuration of accounts is in the environment (accounts.py)."""
    places = tuple(f"{place.rstrip('/')}/" for place in os.environ.get(PLACES_VARIABLE, "").split(",") if place)
    return Gate(auth.create_app(flask_app), flask_app, os.environ.get(handlers.STATIC_PREFIX_ENV_VAR, ""), places)


def installed_routes() -> list[tuple[str, str]]:
    """Methods and paths of all routes of the installed MLflow, as Flask and FastAPI write them."""
    app = auth.create_app(flask_app)
    return sorted({(method, path) for method, path in _routes(app.routes) if method not in ("HEAD", "OPTIONS")})


def _routes(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    for route in routes:
        router = getattr(route, "original_router", None)
        if isinstance(route, APIRoute):
            yield from ((method, prefix + route.path) for method in route.methods or ())
        elif router is not None:
            yield from _routes(router.routes, prefix + route.include_context.prefix)  # type: ignore[attr-defined]
        else:  # where the Flask application hangs
            yield from ((method, str(rule)) for rule in flask_app.url_map.iter_rules() for method in rule.methods or ())


def _credentials(scope: Scope) -> tuple[str, str]:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, coded = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    try:
        name, colon, password = base64.b64decode(coded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if scheme.lower() != b"basic" or not colon:
        raise _unknown()
    return name, password


def _unknown() -> Refused:
    return Refused(401, "Name and password are those of an account", {"WWW-Authenticate": 'Basic realm="mlflow"'})


if __name__ == "__main__":
    for method, path in installed_routes():
        print(method, path)
