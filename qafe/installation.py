"""What pip has noted about this project: its version, and the entry points by which its packages find each other.

In a clone that was never installed, but whose dependencies were, setup.cfg says the same.
"""

from __future__ import annotations

import configparser
import sys
from importlib.metadata import EntryPoint, EntryPoints, PackageNotFoundError, entry_points
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

NAME = "qafe-net"
CLONE = Path(__file__).parents[1]


def expect(*libraries: str) -> None:
    """Ends a command for which this Python lacks libraries, in one line; elsewhere an import says what it lacks."""
    if sys.argv[:1] != ["-m"]:  # as long as Python looks for what ``python -m`` names
        return
    if missing := [name for name in libraries if find_spec(name) is None]:
        print(
            f"error: the project's libraries must be installed, {sys.executable} has no {', '.join(missing)}. Set up: "
            "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e .  and start with .venv/bin/python.",
            file=sys.stderr,
        )
        raise SystemExit(2)


def version() -> str:
    """The project's version, and whether it is that of a clone."""
    try:
        return installed_version(NAME)
    except PackageNotFoundError:
        return f"{_setup().get('metadata', 'version', fallback='unknown')}+clone"


def entry_point(group: str, name: str) -> EntryPoint | None:
    """What is offered under a name in a group, by this project or any other that is installed."""
    for found in entry_points(group=group, name=name):
        return found
    lines = _setup().get("options.entry_points", group, fallback="").strip().splitlines()
    return next(iter(EntryPoints(_offered(line, group) for line in lines).select(name=name)), None)


def _offered(line: str, group: str) -> EntryPoint:
    name, _, value = line.partition("=")
    return EntryPoint(name=name.strip(), value=value.strip(), group=group)


def _setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(CLONE / "setup.cfg")
    return found
