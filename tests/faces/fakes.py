"""What tests of preparation use instead of faces: clips, models that find one there, tasks that end their process."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path

import cv2
import numpy as np

from qafe.errors import FaceError
from qafe.faces import prepare
from qafe.faces.labels import Recording
from qafe.faces.settings import PrepareSettings
from qafe.faces.subject import Faces, Floats, Frame


def write_clip(
    path: Path,
    count: int,
    *,
    size: tuple[int, int] = (64, 48),
    hz: float = 30,
    light: float = 1,
    black: Container[int] = (),
    white: Container[int] = (),
) -> Path:
    """A still picture of nothing, trembling a little, with frames that are black or white; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(0).integers(20, 255, (6, 8, 3), np.uint8)
    picture = cv2.resize(coarse, (size[0] + 2, size[1]), interpolation=cv2.INTER_CUBIC) * light
    codec = {".avi": "MJPG", ".mkv": "FFV1"}.get(path.suffix, "mp4v")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), hz, size)
    for number in range(count):
        frame = np.ascontiguousarray(picture[:, number % 3 :][:, : size[0]].astype(np.uint8))
        writer.write(np.full_like(frame, 255) if number in white else frame * np.uint8(number not in black))
    writer.release()
    return path


class FakeModels:
    """A face in the middle of every frame that is not black or white."""

    def find(self, frame: Frame) -> Faces:
        if not 5 < frame.mean() < 250:
            return Faces(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32))
        height, width = frame.shape[:2]
        box = np.array([width * 0.25, height * 0.2, width * 0.75, height * 0.9], np.float32)
        shape = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)
        points = box[:2] + shape * (box[2:] - box[:2])
        return Faces(box[None], np.ones(1, np.float32), points[None])

    def find_near(self, frame: Frame, box: Floats) -> Faces:
        return self.find(frame)

    def landmarks(self, frame: Frame, box: Floats) -> Floats:
        shape = np.random.default_rng(0).uniform(0.1, 0.9, (106, 2)).astype(np.float32)
        return np.asarray(box[:2] + shape * (box[2:] - box[:2]), np.float32)


def die_once(mark: Path) -> str:
    """Kills its process the first time."""
    if mark.exists():
        return "done"
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def die(folder: Path) -> None:
    """Kills its process each time and leaves a file for each."""
    (folder / f"{os.getpid()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def pid_after(seconds: float, mark: Path | None = None) -> int:
    """The process it ran in; with a mark, says first that it has started."""
    if mark is not None:
        mark.write_text(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


def fail(text: str) -> None:
    """Raises what only one video should see."""
    raise ValueError(text)


def refuse(text: str) -> None:
    """Raises an error of ours."""
    raise FaceError(text)


def wait_for(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def measure_memory(videos: Path, source: str, out: Path) -> None:
    """Prepares one recording with fake models and prints the peak of this process' memory in KiB."""
    cv2.setNumThreads(1)
    prepare.face_models = lambda name, root: FakeModels()  # type: ignore[assignment,return-value]
    recording = Recording("P1", Path(source).stem, source, "smile", 1.0, None, None, None)
    prepare.prepare_video(recording, videos=videos, out=out, settings=PrepareSettings(memory_mb=50))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    measure_memory(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
