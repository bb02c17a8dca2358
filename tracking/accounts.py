"""Who may do what on a server with ``--auth``: MLflow's own accounts, in a database in the server's folder.

Everybody with an account may read. A role adds to that; a grant adds to one experiment or one model.
"""

from __future__ import annotations

import argparse
import configparser
import getpass
import importlib.util
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from qafe.errors import TrackingError

from .connection import connect
from .database import Database
from .migrate import ACCOUNTS, prepare
from .roles import PERMISSIONS_OF as ROLES

ADMIN = "admin"
ADMIN_PASSWORD_FILE = "admin.password"
ADMIN_PASSWORD_VARIABLE = "MLFLOW_AUTH_ADMIN_PASSWORD"
DATABASE_FILE = "accounts.db"
CONFIG_FILE = "accounts.ini"
SECRET_FILE = "flask.key"
SECRET_VARIABLE = "MLFLOW_FLASK_SERVER_SECRET_KEY"
PUBLISHED_PASSWORD = "password1234"
CACHE_S = 30
"""How long the server remembers a password that it has checked: a check takes it a third of a second."""
WORKSPACE = "default"
PLACE = re.compile(r"(?:abfss|b2|gs|r2|s3|wasbs)://[\w.@/-]+")
PLACES_VARIABLE = "QAFE_ARTIFACT_PLACES"
SOURCE = "^models:/m-[0-9a-f]{32}$"
"""What a version may be of: a finished model's files do not change (gate.py)."""
PERMISSIONS = ("READ", "EDIT", "MANAGE", "DENY")
RESOURCES = {"experiment": "experiment", "model": "registered_model"}


class Accounts:
    """The accounts of the server that has this folder; made on first use.

    Raises:
        TrackingError: Flask-WTF, which MLflow's accounts need, is not installed.
    """

    def __init__(self, home: Path) -> None:
        if importlib.util.find_spec("flask_wtf") is None:
            raise TrackingError("accounts need Flask-WTF, which is not installed. pip install 'mlflow[auth]'.")
        own_folder(home)
        self.home = home
        database = Database(f"sqlite:///{(home / DATABASE_FILE).resolve()}")
        prepare(database, ACCOUNTS)
        (home / DATABASE_FILE).chmod(0o600)
        from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

        self._store: Any = SqlAlchemyStore()
        self._store.init_db(database.uri)

    def add(self, name: str, password: str, role: str) -> None:
        """A new account; role is one of `ROLES` or ``admin``.

        Raises:
            TrackingError: the name is taken or MLflow does not allow name or password.
        """
        _check_password(password)
        with _one_line():
            user = self._store.create_user(name, password, is_admin=role == ADMIN)
            if ROLES.get(role):
                self._store.assign_role_to_user(user.id, self._role(role))

    def change_password(self, name: str, password: str) -> None:
        """A new password for an account."""
        _check_password(password)
        with _one_line():
            self._store.update_user(name, password=password)

    def remove(self, name: str) -> None:
        """Deletes an account with its grants; never the last administrator.

        Raises:
            TrackingError: there is no such account, or nobody could administer the server without it.
        """
        if self.administrators() == [name]:
            raise TrackingError(
                f"a server needs an administrator, {name} is the last one. Add another one first "
                "(python -m tracking.server user add NAME --role admin)."
            )
        with _one_line():
            self._store.delete_user(name)

    def grant(self, name: str, kind: str, resource: str, permission: str) -> None:
        """A permission on an experiment (its id) or a registered model (its name), or on all of them (``*``)."""
        with _one_line():
            self._store.grant_user_permission(name, kind, resource, permission)

    def administrators(self) -> list[str]:
        """Names of those who may do everything, in order."""
        return sorted(user.username for user in self._store.list_users() if user.is_admin)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, role and grants of every account, by name."""
        for user, roles in sorted(self._store.list_users_with_roles(), key=lambda pair: pair[0].username):
            named = [role.name for role in roles if role.name in ROLES]
            grants = [
                f"{grant.resource_type}:{grant.resource_pattern}={grant.permission}"
                for role in roles
                if role.name not in ROLES
                for grant in role.permissions
            ]
            yield user.username, ADMIN if user.is_admin else (named or ["reader"])[0], " ".join(sorted(grants))

    def _role(self, name: str) -> int:
        for role in self._store.list_roles([WORKSPACE]):
            if role.name == name:
                return int(role.id)
        role = self._store.create_role(name, WORKSPACE)
        for kind, permission in ROLES[name].items():
            self._store.add_role_permission(role.id, kind, "*", permission)
        return int(role.id)


def environment(home: Path, places: str = "") -> dict[str, str]:
    """What a server with accounts has in its environment; makes the first administrator, configuration and secret.

    His password is that of ``MLFLOW_AUTH_ADMIN_PASSWORD`` or a new one, in a file that only this account can read.

    Args:
        places: where experiments may have their artifacts beside the server's own place, with commas.
    Raises:
        TrackingError: MLflow does not allow the password, or a place is a folder of this machine.
    """
    for place in filter(None, places.split(",")):
        if not PLACE.fullmatch(place):
            raise TrackingError(
                f"a place of artifacts is a bucket or a part of one, such as s3://bucket/studies, got {place} "
                "(--artifact-places). Correct it."
            )
    accounts = Accounts(home)
    if not accounts.administrators():
        password = os.environ.get(ADMIN_PASSWORD_VARIABLE) or secrets.token_urlsafe(18)
        accounts.add(ADMIN, password, ADMIN)
        if ADMIN_PASSWORD_VARIABLE not in os.environ:
            write_secret(home / ADMIN_PASSWORD_FILE, password)
            print(f"account {ADMIN}: its password is in {home / ADMIN_PASSWORD_FILE}", file=sys.stderr)
    config = configparser.ConfigParser(interpolation=None)
    config["mlflow"] = {
        "default_permission": "READ",
        "database_uri": f"sqlite:///{(home / DATABASE_FILE).resolve()}",
        "admin_username": accounts.administrators()[0],
        "auth_cache_ttl_seconds": str(CACHE_S),
    }
    with open(home / CONFIG_FILE, "w") as out:
        config.write(out)
    if not (home / SECRET_FILE).exists():
        write_secret(home / SECRET_FILE, secrets.token_hex(32))
    secret = os.environ.get(SECRET_VARIABLE) or (home / SECRET_FILE).read_text().strip()
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # of gate.py
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str((home / CONFIG_FILE).resolve()),
        SECRET_VARIABLE: secret,
        "PYTHONPATH": os.pathsep.join(path),
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        PLACES_VARIABLE: places,
        "MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX": SOURCE,
    }


def own_folder(folder: Path) -> None:
    """Makes a folder that only this account can look into; one that is there stays as it is.

    Raises:
        TrackingError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise TrackingError(f"a folder must be writable, {folder} cannot be made ({err.strerror}). Name another one.") from err  # fmt: skip  # noqa: E501


def write_secret(path: Path, secret: str) -> None:
    """Writes a file that only this account can read, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(secret + "\n")
    os.replace(unfinished, path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of ``python -m tracking.server user``."""
    commands = parser.add_subparsers(dest="user_command", required=True)
    for name, words in (("add", "add an account"), ("passwd", "change a password")):
        sub = commands.add_parser(name, help=f"{words}; the password is asked for, or the first line of stdin")
        sub.add_argument("name")
        sub.add_argument("--generate", action="store_true", help="make a password and print it, once")
        if name == "add":
            roles = [*ROLES, ADMIN]
            sub.add_argument("--role", choices=roles, default="reader", help="reader: looks at everything; editor: "
                             "logs sweeps; curator: registers and promotes too (default: %(default)s)")  # fmt: skip
    commands.add_parser("list", help="list accounts, roles and grants")
    commands.add_parser("remove", help="delete an account").add_argument("name")
    sub = commands.add_parser("grant", help="give a permission on one experiment or model")
    sub.add_argument("name")
    sub.add_argument("resource", help="experiment:NAME or model:NAME; * for all of them")
    sub.add_argument("permission", choices=PERMISSIONS)


def run_command(options: argparse.Namespace, home: Path, database: Database) -> int:
    """Runs one of the commands of `add_arguments`."""
    accounts = Accounts(home)
    command = options.user_command
    if command == "list":
        for row in [("name", "role", "grants"), *accounts.rows()]:
            print(f"{row[0]:20}  {row[1]:8}  {row[2]}".rstrip())
    elif command == "remove":
        accounts.remove(options.name)
    elif command == "grant":
        kind, _, resource = options.resource.partition(":")
        if kind not in RESOURCES or not resource:
            raise TrackingError(
                f"a resource is experiment:NAME or model:NAME, got {options.resource}. Name one so (model:qafe-net)."
            )
        if kind == "experiment" and resource != "*":
            resource = _experiment_id(database, resource)
        accounts.grant(options.name, RESOURCES[kind], resource, options.permission)
    else:
        password = secrets.token_urlsafe(18) if options.generate else _asked(options.name)
        if command == "add":
            accounts.add(options.name, password, options.role)
        else:
            accounts.change_password(options.name, password)
        if options.generate:
            print(password)
    if command in ("passwd", "remove"):
        print(f"a running server may take {CACHE_S} s to notice", file=sys.stderr)
    return 0


def _check_password(password: str) -> None:
    if password == PUBLISHED_PASSWORD:
        raise TrackingError("a password is known to nobody else, this one is MLflow's old default. Choose another one.")


def _experiment_id(database: Database, name: str) -> str:
    found = connect(database.uri, create=False).get_experiment_by_name(name)
    if found is None:
        raise TrackingError(f"an experiment must be in the store, {name} is not. See the MLflow UI for their names.")
    return str(found.experiment_id)


def _asked(name: str) -> str:
    """A password from the terminal, twice, or from the first line of stdin: never from the command line."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass(f"password of {name}: ")
    if getpass.getpass("again: ") != password:
        raise TrackingError("a password is typed the same twice, these two differ. Try again.")
    return password


@contextmanager
def _one_line() -> Iterator[None]:
    """MLflow's refusals as ours."""
    try:
        yield
    except MlflowException as err:
        said = str(err).split(" Error: ")[0].splitlines()[0].rstrip(".")
        raise TrackingError(f"MLflow must allow the account, it says: {said}. See user list.") from err
