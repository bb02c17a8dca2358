"""A user's own study: one Python file with one `Sweep` in it. Only the driver ever runs it."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from qafe.errors import ConfigError, QafeError

from .sweep import Grid, Space, Suggester, Sweep

EXAMPLE = "See sweeps/studies.py for examples"


def is_file_name(study: str) -> bool:
    """Whether a study is named by the path of its file."""
    return study.endswith(".py") or "/" in study


def load_sweep(path: Path) -> Sweep:
    """The study that a file defines; it has the file's text with it.

    Raises:
        ConfigError: there is no such file, it cannot be run (with the line), or it does not define one `Sweep`.
    """
    try:
        source = path.read_text()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"a study is a name (see --list) or a Python file, {path} cannot be read ({type(err).__name__}). "
            "Correct the path."
        ) from err
    return from_source(source, path.name)


def from_source(source: str, name: str) -> Sweep:
    """The study that a text defines.

    Args:
        name: what messages call the text.
    Raises:
        ConfigError: it cannot be run, or it does not define one `Sweep`.
    """
    module = types.ModuleType(f"qafe_study_{hashlib.sha256(source.encode()).hexdigest()[:16]}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    except (Exception, SystemExit) as err:
        raise _explained(err, name) from err
    found = {id(value): value for value in vars(module).values() if isinstance(value, Sweep)}
    if len(found) != 1:
        names = ", ".join(sweep.name for sweep in found.values()) or "none"
        raise ConfigError(
            f"a study's file must define one Sweep, {name} has {len(found)} ({names}). "
            f"Write one SWEEP = Sweep(name=..., about=..., space=...). {EXAMPLE}."
        )
    (sweep,) = found.values()
    space = sweep.space if isinstance(sweep.space, Grid) else _FileSpace(source, name, sweep.space)
    return dataclasses.replace(sweep, space=space, source=source)


class _FileSpace:
    """A space of a file: says which line of it fails, and is pickled as the file's text."""

    def __init__(self, source: str, name: str, space: Space) -> None:
        self.source = source
        self.name = name
        self.space = space

    def __call__(self, trial: Suggester) -> None:
        try:
            self.space(trial)
        except Exception as err:
            raise _explained(err, self.name) from err

    def __reduce__(self) -> tuple[Any, ...]:
        return _space_of, (self.source, self.name)


def _space_of(source: str, name: str) -> Space:
    return from_source(source, name).space


def _explained(err: BaseException, name: str) -> ConfigError:
    """What went wrong in the file, with the last line of it that took part."""
    if isinstance(err, SyntaxError) and err.filename == name:
        line = err.lineno
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(err.__traceback__) if frame.filename == name]
        line = lines[-1] if lines else None
    place = f"{name}, line {line}" if line else name
    kind = "" if isinstance(err, QafeError) else f"{type(err).__name__}: "
    text = err.msg if isinstance(err, SyntaxError) else str(err)
    return ConfigError(f"the study of {place} cannot be run: {kind}{text}")
