"""What a config says of this machine, and must not say elsewhere."""

from __future__ import annotations

from pathlib import Path

from qafe.config import Config, flatten, override

PATH_SETTINGS = ("model.rgb.weights", "model.heatmap.weights")


def without_paths(config: Config) -> Config:
    """The config with its pretrained weights named by their file's name alone: what leaves for the tracking store."""
    settings = flatten(config)
    return override(config, {name: Path(settings[name]).name for name in PATH_SETTINGS})
