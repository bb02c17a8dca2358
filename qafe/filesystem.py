"""What file system a folder is on, and whether that keeps what we rely on: locks, renames, and what is synced."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = frozenset(
    (
        "9p",
        "afs",
        "beegfs",
        "beegfs_nodev",
        "ceph",
        "ceph-fuse",
        "cifs",
        "coda",
        "davfs",
        "fhgfs",
        "gcsfuse",
        "glusterfs",
        "goofys",
        "gpfs",
        "juicefs",
        "lustre",
        "mfs",
        "moosefs",
        "ncpfs",
        "nfs",
        "nfs3",
        "nfs4",
        "orangefs",
        "panfs",
        "pvfs2",
        "rclone",
        "s3fs",
        "smb3",
        "smbfs",
        "sshfs",
        "weka",
        "wekafs",
    )
)
"""Types of network file systems, where they are FUSE's without its ``fuse.``."""
LOCAL_LOCKS = frozenset(("nolock", "local_lock=all", "local_lock=flock", "localflock"))
"""Mount options of NFS and Lustre under which a lock holds on one machine only."""


@dataclass(frozen=True)
class Mount:
    """A file system as it is mounted; the type is empty where the system does not say."""

    type: str = ""
    options: frozenset[str] = frozenset()

    @property
    def network(self) -> bool:
        """Whether other machines may write there, too."""
        return self.type.removeprefix("fuse.") in NETWORK


def mount_of(path: Path) -> Mount:
    """What is mounted where a file or folder is, or will be."""
    place, found, depth = path.resolve(), Mount(), 0
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, (kind, _, *more) = left.split(" "), right.split(" ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        if place.is_relative_to(point) and len(point.parts) >= depth:  # the last one covers those before it
            depth, found = len(point.parts), Mount(kind, frozenset(",".join([fields[5], *more]).split(",")))
    return found


def check_database(file: Path, flag: str) -> None:
    """Refuses a place where SQLite may lose data.

    Args:
        flag: that names the file.
    Raises:
        ConfigError: it is on a network file system.
    """
    if (mount := mount_of(file)).network:
        raise ConfigError(
            f"SQLite needs a disk of this machine, for locks of network file systems may not hold, and {file} is on "
            f"{mount.type} ({flag}). Name a file on a local disk, sqlite:////PATH, or a server for the group."
        )


def check_folder(folder: Path, flag: str) -> str:
    """Tries whether a folder locks, renames and syncs files.

    Args:
        flag: that names the folder.
    Returns:
        What people should know of its locks; empty where nothing is to be said.

    Raises:
        ConfigError: it does not do one of them.
    """
    mount, name = mount_of(folder), f".check-{uuid.uuid4().hex}"
    place, moved = folder / name, folder / f"{name}.moved"
    step, lacks = "write", ""
    try:
        moved.write_bytes(b"old")
        with open(place, "xb") as first:
            first.write(b"new")
            first.flush()
            step = "sync"
            os.fsync(first.fileno())
            step = "lock"
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(place, "r+b") as second, contextlib.suppress(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lacks = "a second process gets a lock that is held"
        if not lacks:
            step = "rename"
            os.replace(place, moved)
            lacks = "" if moved.read_bytes() == b"new" else "the old file is still there"
    except OSError as err:
        lacks = err.strerror or type(err).__name__
    finally:
        for left in (place, moved):
            with contextlib.suppress(OSError):
                left.unlink()
    if lacks:
        raise ConfigError(
            f"a sweep needs a folder that can write, sync, lock and rename files, {folder} cannot {step} ({lacks}"
            f"{f'; {mount.type}' if mount.type else ''}). Name another one ({flag})"
            f"{', or mount it with locks (Lustre: -o flock).' if step == 'lock' else '.'}"
        )
    if mount.options & LOCAL_LOCKS:
        return (
            f"{folder} is mounted with locks that hold on one machine only ({mount.type}): start no second driver of a "
            "sweep on another one"
        )
    return ""
