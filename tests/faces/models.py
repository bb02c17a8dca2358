"""The real face models that tests use where there are any, and the real clips one by one."""

import os
from functools import cache
from pathlib import Path

import pytest

from qafe.faces.detect import FaceModels

PACK = "testpack"


def model_root() -> Path:
    """The folder of the test pack (QAFE_FACE_MODELS, or ../shared/face_models); skips the test where there is none."""
    default = Path(__file__).parents[3] / "shared" / "face_models"
    path = Path(os.environ.get("QAFE_FACE_MODELS", default))
    if not (path / "models" / PACK).is_dir():
        pytest.skip(f"the face models are not at {path} (QAFE_FACE_MODELS)")
    pytest.importorskip("insightface", reason="the extra faces is not installed")
    return path


@cache
def face_models() -> FaceModels:
    """The test pack, loaded once."""
    return FaceModels(PACK, model_root())
