"""Folders that do not lock, rename or sync, and SQLite on network file systems, are refused in one line."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qafe import filesystem
from qafe.errors import ConfigError
from qafe.filesystem import Mount, check_database, check_folder, mount_of
from sweeps.run import main
from tests.conftest import QUICK_FLAGS
from tracking import server
from tracking.connection import check_place, connect

Mounts = Callable[..., None]


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mounts:
    """Makes a machine with these (folder, type, options) mounted, after its root."""

    def make(*mounted: tuple[Path | str, str, str]) -> None:
        lines = []
        for number, (point, kind, options) in enumerate([("/", "ext4", "rw"), *mounted]):
            escaped = str(point).replace(" ", "\\040")
            lines.append(f"{number} 1 0:{number} / {escaped} rw,relatime shared:1 - {kind} src {options}")
        (tmp_path / "mountinfo").write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "mountinfo")

    return make


@pytest.mark.parametrize(
    ("kind", "network"),
    [(kind, True) for kind in ("nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "gpfs", "ceph", "9p", "fuse.sshfs")]
    + [(kind, False) for kind in ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "fuseblk", "fuse.mergerfs", "")],
)
def test_network_file_systems_are_known(kind: str, network: bool) -> None:
    assert Mount(kind).network == network


def test_the_deepest_and_last_mount_counts(mounts: Mounts, tmp_path: Path) -> None:
    mounts(
        ("/data", "nfs4", "rw,vers=4.2"),
        ("/data/local disk", "xfs", "rw"),
        ("/covered", "nfs", "rw"),
        ("/covered", "ext4", "rw"),
    )
    found = {
        path: mount_of(Path(path)).type for path in ("/data", "/data/x/y", "/data/local disk/x", "/database", "/x")
    }
    assert found == {
        "/data": "nfs4", "/data/x/y": "nfs4", "/data/local disk/x": "xfs", "/database": "ext4", "/x": "ext4",
    }  # fmt: skip
    assert mount_of(Path("/covered/x")).type == "ext4"
    assert "vers=4.2" in mount_of(Path("/data")).options
    (tmp_path / "link").symlink_to("/data")
    assert mount_of(tmp_path / "link" / "file").type == "nfs4"


def test_a_system_without_mountinfo_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "none")
    assert mount_of(tmp_path) == Mount()
    check_database(tmp_path / "a.db", "--backend")


def test_a_folder_of_this_disk_will_do_and_keeps_nothing(tmp_path: Path) -> None:
    assert check_folder(tmp_path, "--storage") == ""
    assert not list(tmp_path.iterdir())


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("function", "does", "words"),
    [
        ("fcntl.flock", failing(errno.ENOLCK), "cannot lock (No locks available"),
        ("fcntl.flock", failing(errno.ENOSYS), "cannot lock (Function not implemented"),
        ("fcntl.flock", failing(errno.EOPNOTSUPP), "cannot lock (Operation not supported"),
        ("fcntl.flock", lambda *_: None, "cannot lock (a second process gets a lock that is held"),
        ("os.fsync", failing(errno.EINVAL), "cannot sync (Invalid argument"),
        ("os.replace", failing(errno.EPERM), "cannot rename (Operation not permitted"),
        ("os.replace", lambda *_: None, "cannot rename (the old file is still there"),
    ],
)
def test_what_a_folder_lacks_is_said(
    function: str,
    does: Callable[..., None],
    words: str,
    tmp_path: Path,
    mounts: Mounts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mounts((tmp_path, "lustre", "rw,flock"))
    folder = tmp_path / "storage"
    folder.mkdir()
    monkeypatch.setattr(function, does)
    with pytest.raises(ConfigError) as refused:
        check_folder(folder, "--storage")
    assert f"{folder} {words}; lustre). Name another one (--storage)" in str(refused.value)
    assert ("Lustre: -o flock" in str(refused.value)) == ("lock (" in words)
    assert not list(folder.iterdir())


def test_a_folder_that_is_not_there_or_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot write \(No such file or directory"):
        check_folder(tmp_path / "none", "--storage")
    monkeypatch.setattr(Path, "write_bytes", failing(errno.ENOSPC))
    with pytest.raises(ConfigError, match=r"cannot write \(No space left on device"):
        check_folder(tmp_path, "--storage")


@pytest.mark.parametrize(
    ("kind", "options"), [("nfs", "rw,nolock"), ("nfs4", "rw,local_lock=all"), ("lustre", "rw,localflock")]
)
def test_locks_of_one_machine_are_told(kind: str, options: str, tmp_path: Path, mounts: Mounts) -> None:
    mounts((tmp_path, kind, options))
    assert f"locks that hold on one machine only ({kind})" in check_folder(tmp_path, "--storage")
    mounts((tmp_path, kind, "rw,local_lock=none"))
    assert check_folder(tmp_path, "--storage") == ""


def line(data_root: Path, folder: Path, *flags: str) -> list[str]:
    return ["fusion_search", "--data-root", str(data_root), "--preset", "tiny", *QUICK_FLAGS, *flags, "--storage",
            str(folder / "storage")]  # fmt: skip


def refusal(text: str) -> str:
    (error,) = [row for row in text.splitlines() if row.startswith("error: ")]
    assert "Traceback" not in text
    return error


def test_a_sweep_on_a_disk_without_locks_is_refused_before_it_begins(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flock = fcntl.flock

    def none_here(file: object, operation: int) -> None:
        if "storage" in str(getattr(file, "name", "")):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr("fcntl.flock", none_here)
    assert main(line(sample_root, tmp_path, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")) == 2
    assert "cannot lock (No locks available" in refusal(capsys.readouterr().err)
    assert not list((tmp_path / "storage").iterdir()), "the name is free again"


@pytest.mark.parametrize("flag", ["--tracking-uri", "--study-storage"])
def test_a_sweeps_sqlite_on_a_network_folder_is_refused(
    flag: str, sample_root: Path, tmp_path: Path, mounts: Mounts, capsys: pytest.CaptureFixture[str]
) -> None:
    mounts((tmp_path / "shared", "nfs4", "rw"))
    (tmp_path / "shared").mkdir()
    places = {"--tracking-uri": f"sqlite:///{tmp_path}/mlflow.db"} | {flag: f"sqlite:///{tmp_path}/shared/a.db"}
    flags = [word for pair in places.items() for word in pair]
    assert main(line(sample_root, tmp_path, *flags)) == 2
    error = refusal(capsys.readouterr().err)
    assert "SQLite needs a disk of this machine" in error
    assert f"{tmp_path}/shared/a.db is on nfs4 ({flag}" in error
    assert not list((tmp_path / "shared").iterdir())
    assert not list((tmp_path / "storage").glob("*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "sqlite:///{}/shared/m.db"], "shared/m.db is on fuse.sshfs (--backend)"),
        (["--backend", "sqlite:///{}/m.db", "--auth", "--home", "{}/shared/home"], "is on fuse.sshfs (--home"),
    ],
)
@pytest.mark.parametrize("how", [[], ["--background"]])
def test_a_servers_sqlite_on_a_network_folder_is_refused(
    flags: list[str], words: str, how: list[str], tmp_path: Path, mounts: Mounts, capsys: pytest.CaptureFixture[str]
) -> None:
    mounts((tmp_path / "shared", "fuse.sshfs", "rw"))
    (tmp_path / "shared").mkdir()
    assert server.main(["start", *(flag.format(tmp_path) for flag in flags), *how]) == 2
    assert words in refusal(capsys.readouterr().err)
    assert not list((tmp_path / "shared").iterdir())


def test_a_store_that_is_there_can_be_read_and_taken_away(tmp_path: Path, mounts: Mounts) -> None:
    uri = f"sqlite:///{tmp_path}/shared/m.db"
    (tmp_path / "shared").mkdir()
    connect(uri)
    mounts((tmp_path / "shared", "nfs", "rw"))
    connect(uri, create=False)
    with pytest.raises(ConfigError, match="is on nfs"):
        connect(uri)
    for other in ("postgresql://host/x", "http://host:5000", "sqlite://", "sqlite:///:memory:", ""):
        check_place(other, "--backend")
    with pytest.raises(ConfigError, match="is on nfs"):
        check_place(f"sqlite+pysqlite:///{tmp_path}/shared/a.db?timeout=5", "--study-storage")
