"""What configs and tracebacks say of this machine and of patients, and must not say elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from qafe.config import PRETRAINED, Config
from qafe.dotted import flatten, override


def without_paths(config: Config) -> Config:
    """The config with its pretrained weights named by their file's name alone: what leaves for the tracking store."""
    settings = flatten(config)
    return override(config, {name: Path(settings[name]).name for name in PRETRAINED})


def without_messages(trace: str) -> str:
    """A traceback's files, lines, code and error classes: a message may name a patient's file."""
    kept: list[str] = []
    code_next = False
    for line in trace.splitlines():
        place = re.match(r'\s*File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)', line)
        error = re.match(r"(?P<name>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning))(?::|$)", line)
        if place:
            parts = Path(place["path"]).parts
            short = "/".join(parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-3:])
            kept.append(f'  File "{short}", line {place["line"]}, in {place["name"]}')
        elif code_next and line.startswith("    "):
            kept.append(line)
        elif error:
            kept.append(error["name"])
        code_next = bool(place)
    return "\n".join(kept) + "\n" if kept else ""
