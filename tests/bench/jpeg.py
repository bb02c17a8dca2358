"""One frame's JPEG -> its pixels: the library that `qafe.store` decodes with against others, in turns, on one thread.

Of the others what is installed takes part. (torchcodec's wheel loads only where CUDA's libraries are; PyTurboJPEG
takes the system's libjpeg-turbo, and from version 2 on none older than 3.)
"""

from __future__ import annotations

import importlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from qafe.data.sample import SampleConfig, make_sample

from .clips import GRAIN
from .rounds import Found, Row, compare

Decode = Callable[[bytes], Any]
FILES = 40


def bench(rounds: int) -> Found:
    """A row for each rival and kind of file: drawn faces as they are, and with the grain of a camera."""
    cv2.setNumThreads(1)
    found = Found([])
    rivals = {"OpenCV": _opencv, "Pillow": _pillow}
    for name, load in {"PyTurboJPEG": _turbo, "torchcodec": _torchcodec}.items():
        try:
            rivals[name] = load()
        except Exception as err:  # Foreign libraries: whatever they raise.
            found.left_out.append(f"{name}: {' '.join(str(err).split())[:120]}")
    for files in _files():
        found.rows += [_against(name, decode, files, rounds) for name, decode in rivals.items()]
    return found


def _files() -> list[list[bytes]]:
    """JPEGs of the sample dataset, as they are and with grain."""
    with tempfile.TemporaryDirectory() as name:
        sample = make_sample(
            Path(name) / "sample", SampleConfig(train_patients=4, test_patients=1, clips=1, frames=(12, 16)), workers=1
        )
        plain = [path.read_bytes() for path in sorted(sample.glob("frames/*/*/*.jpg"))[:FILES]]
    rng = np.random.default_rng(0)
    grainy = []
    for file in plain:
        noisy = np.clip(_opencv(file) + rng.normal(0, GRAIN, (256, 256, 3)), 0, 255).astype(np.uint8)
        grainy.append(cv2.imencode(".jpg", noisy[..., ::-1])[1].tobytes())
    return [plain, grainy]


def _against(name: str, decode: Decode, files: list[bytes], rounds: int) -> Row:
    apart = max(int(np.abs(simplejpeg.decode_jpeg(file).astype(int) - decode(file)).max()) for file in files)
    row = compare(
        f"JPEG of {sum(map(len, files)) / len(files) / 1e3:.0f} kB, 256 px",
        "frame",
        lambda: [simplejpeg.decode_jpeg(file) for file in files],
        lambda: [decode(file) for file in files],
        per=len(files),
        rounds=rounds,
    )
    return replace(row, rival_name=name, notes=[f"largest difference: {apart} levels"])


def _opencv(file: bytes) -> npt.NDArray[np.uint8]:
    picture: npt.NDArray[np.uint8] = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    return picture


def _pillow(file: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _turbo() -> Decode:
    module = importlib.import_module("turbojpeg")
    decoder = module.TurboJPEG()
    return lambda file: decoder.decode(file, pixel_format=module.TJPF_RGB)


def _torchcodec() -> Decode:
    decode = importlib.import_module("torchcodec.decoders").decode_jpeg
    return lambda file: decode(file).permute(1, 2, 0).numpy()
