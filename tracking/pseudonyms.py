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

from qafe.errors import TrackingError

KEY_VARIABLE = "QAFE_PSEUDONYM_KEY_FILE"
KEY_BYTES = 32


def key_path() -> Path:
    """Where the key lies: ``QAFE_PSEUDONYM_KEY_FILE`` or the user's configuration folder."""
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qafe" / "pseudonym.key"


def load_key() -> bytes:
    """The local key; made on first use, readable by its owner alone.

    Raises:
        TrackingError: the key's file is damaged, or cannot be read or made.
    """
    path = key_path()
    try:
        return _read_or_make(path)
    except (OSError, ValueError) as err:
        raise TrackingError(
            f"the pseudonym key must be a readable file of hexadecimal digits, {path} is not ({type(err).__name__}). "
            f"Put its backup back, or name another file in {KEY_VARIABLE}; a new key gives new pseudonyms."
        ) from err


def _read_or_make(path: Path) -> bytes:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(secrets.token_hex(KEY_BYTES) + "\n")
        with contextlib.suppress(FileExistsError):  # another process was first: its key holds
            os.link(unfinished, path)
        unfinished.unlink()
    key = bytes.fromhex(path.read_text().strip())
    if len(key) < KEY_BYTES:
        raise ValueError(f"{len(key)} bytes")
    return key


def pseudonym(name: str, key: bytes) -> str:
    """Twelve hexadecimal digits for a name: HMAC-SHA256 under the key."""
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:12]
