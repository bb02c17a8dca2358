"""The folder of numbers that the published code computed, and our model filled with its weights.

The folder is named by the environment variable QAFE_REFERENCE, and lies at ../shared/reference beside the
repository otherwise. Where it is absent the tests that need it are skipped.
"""

import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from qafe.config import AxisOrder, ModelConfig
from qafe.model.qafenet import QAFENet
from qafe.model.weights import REFERENCE_MODULES

AXIS_ORDERS: dict[str, AxisOrder] = {"faithful": "reference", "corrected": "corrected"}
"""The goldens' name of an order of axes -> ours."""


@cache
def folder() -> Path:
    """The folder of goldens; skips the test where there is none."""
    default = Path(__file__).parents[2] / "shared" / "reference"
    path = Path(os.environ.get("QAFE_REFERENCE", default))
    if not (path / "fill_rule.py").is_file():
        pytest.skip(f"the published code's numbers are not at {path} (QAFE_REFERENCE)")
    return path


@cache
def rule() -> ModuleType:
    """The module that makes weights and inputs from names."""
    spec = importlib.util.spec_from_file_location("fill_rule", folder() / "fill_rule.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.self_check()
    return module


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of one .npz file."""
    with np.load(folder() / f"{name}.npz") as file:
        found = {key: file[key] for key in file.files}
    assert found, name
    return found


@cache
def table(name: str) -> Any:
    """The content of one .json file."""
    return json.loads((folder() / f"{name}.json").read_text())


def keys(module: str) -> list[dict[str, Any]]:
    """The entries of one list of keys."""
    entries: list[dict[str, Any]] = table(f"keys_{module}")["entries"]
    assert entries, module
    return entries


@cache
def state_dicts() -> dict[str, dict[str, torch.Tensor]]:
    """The published network's four state dicts, filled by the rule."""
    return {
        module: {
            entry["key"]: torch.from_numpy(np.array(rule().fill(module, entry["key"], tuple(entry["shape"]))))
            for entry in keys(module)
        }
        for module in REFERENCE_MODULES
    }


def model(axis_order: AxisOrder, dtype: torch.dtype, path: Path) -> QAFENet:
    """Our model with the published network's weights, through the loader of the authors' checkpoints."""
    from qafe.model.weights import load_reference_checkpoint

    file = path / "reference.pth"
    if not file.exists():
        torch.save({"epoch": 1, **state_dicts()}, file)
    net = QAFENet(ModelConfig(rgb_axis_order=axis_order))
    load_reference_checkpoint(net, file)
    return net.to(dtype).eval()


@cache
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """RGB and heatmap clips of samples 0 and 1, float32."""
    rgb = rule().to_rgb_tensor(rule().video())
    heatmap = rule().to_heatmap_tensor(rule().heatmap())
    return torch.from_numpy(rgb), torch.from_numpy(heatmap)
