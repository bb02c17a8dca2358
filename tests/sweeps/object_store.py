"""An object store for tests: moto's S3 on a free port, a process of its own that can be sent to sleep."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.tracking.stores import free_port

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def object_store(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """A store with a bucket ``sweeps``: its process, and the environment of those who use it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    line = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with open(folder / "object_store.log", "ab") as log:
        process = subprocess.Popen(line, env=os.environ | CREDENTIALS, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/sweeps", method="PUT"), timeout=10).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (folder / "object_store.log").read_text()[-2000:]
                time.sleep(0.1)
        else:
            raise AssertionError("the object store did not come up in a minute")
        yield process, CREDENTIALS | {"AWS_ENDPOINT_URL": address}
    finally:
        process.kill()
        process.wait()
