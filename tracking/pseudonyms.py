"""Names that leave the group's disks: a keyed hash in place of a patient's or a clip's name.

The key is made once and stays local; whoever has it can find a name's pseudonym, nobody else can.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

KEY_VARIABLE = "QAFE_PSEUDONYM_KEY_FILE"


def key_path() -> Path:
    """Where the key lies: ``QAFE_PSEUDONYM_KEY_FILE`` or the user's configuration folder."""
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qafe" / "pseudonym.key"


def load_key() -> bytes:
    """The local key; made on first use, readable by its owner alone."""
    path = key_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(secrets.token_hex(32) + "\n")
        with contextlib.suppress(FileExistsError):  # another process was first: its key holds
            os.link(unfinished, path)
        unfinished.unlink()
    return bytes.fromhex(path.read_text().strip())


def pseudonym(name: str, key: bytes) -> str:
    """Twelve hexadecimal digits for a name: HMAC-SHA256 under the key."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:12]
