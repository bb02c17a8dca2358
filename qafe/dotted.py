"""A config by dotted names: read, replaced, and as JSON that comes back as an equal object."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .config import Config
from .errors import ConfigError

_RETIRED = ("data.memory_mb",)
"""Settings that configs of earlier versions hold, and that decide nothing."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config as a flat dict from dotted name to value, in the order of declaration."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def override(config: Config, settings: Mapping[str, Any]) -> Config:
    """A new config with some settings replaced, by dotted name.

    All replacements are made at once, so that settings that must agree may be changed together. Strings are
    parsed by the setting's own type, as they come from ``--set``; other values are checked against it.

    Raises:
        ConfigError: a name does not exist (the nearest right one is offered), or a value does not fit.
    """
    names = flatten(config)
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no setting named {name!r}.{hint}")
    result: Config = _override(config, settings, "")
    return result


def parse_settings(pairs: list[str]) -> dict[str, str]:
    """``["a.b=c", ...]`` as a dict.

    Raises:
        ConfigError: a pair has no equals sign.
    """
    settings = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"a setting is written name=value, got {pair!r} (--set). Write train.lr=0.001.")
        settings[name.strip()] = value.strip()
    return settings


def to_json(config: Config) -> str:
    """The config as indented JSON that `from_json` turns back into an equal object."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """The config that `to_json` wrote.

    Raises:
        ConfigError: the text is not JSON, or has settings that do not exist.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as err:
        raise ConfigError(f"a config must be JSON, got {text[:40]!r} ({err}). Use a config.json of a run.") from err
    if not isinstance(tree, dict):
        raise ConfigError(f"a config must be a JSON object, got {text[:40]!r}.")
    flat = _flatten_tree(tree)
    return override(Config(), {name: value for name, value in flat.items() if name not in _RETIRED})


def _flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten_tree(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _override(config: Any, settings: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        name = prefix + item.name
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            below = {key: new for key, new in settings.items() if key.startswith(name + ".")}
            if below:
                changes[item.name] = _override(value, below, name + ".")
        elif name in settings:
            changes[item.name] = _convert(settings[name], hints[item.name], name)
    return dataclasses.replace(config, **changes)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """One value as the type of its setting, or a ConfigError that names both."""
    origin = get_origin(hint)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [part for part in value.strip("()[] ").split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list such as [4,6,3], got {value!r}.")
        return tuple(_convert(part, get_args(hint)[0], name) for part in value)
    assert origin not in (Union, types.UnionType), f"no setting is a union: {name}"
    return _convert_scalar(value, hint, name)


def _convert_scalar(value: Any, hint: type, name: str) -> Any:
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    refusal = ConfigError(f"{name} must be {kind}, got {value!r}.")
    if hint is bool:
        lowered = str(value).lower()
        if lowered not in ("true", "false", "1", "0", "yes", "no"):
            raise refusal
        return lowered in ("true", "1", "yes")
    if hint is str:
        return str(value)
    if isinstance(value, bool):
        raise refusal
    try:
        number = float(value)
    except (TypeError, ValueError) as err:
        raise refusal from err
    if number != number or number in (float("inf"), float("-inf")):
        raise refusal
    if hint is int:
        if number != int(number):
            raise refusal
        return int(number)
    return number
