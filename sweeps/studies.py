"""The studies that come with the project."""

from __future__ import annotations

import difflib

import optuna

from qafe.config import ATTENTION_FUSIONS, Config
from qafe.errors import ConfigError

from .sweep import Study


def fusion_space(trial: optuna.trial.BaseTrial, base: Config) -> None:
    """How the two streams meet, and how landmarks become heatmaps.

    Layers, heads, MLP, direction and drop path exist only in the fusions that attend. Heads divide every width that
    the presets have.
    """
    kind = trial.suggest_categorical("model.fusion.kind", ["cross", "cross_split", "gated", "concat", "sum"])
    if kind in ATTENTION_FUSIONS:
        trial.suggest_int("model.fusion.layers", 1, 4)
        trial.suggest_categorical("model.fusion.heads", [1, 2, 4, 8])
        trial.suggest_categorical("model.fusion.mlp_ratio", [1.0, 2.0, 4.0])
        trial.suggest_categorical("model.fusion.query", ["both", "rgb", "heatmap"])
        trial.suggest_float("model.fusion.drop_path", 0.0, 0.3)
    trial.suggest_categorical("model.fusion.position", ["heatmap", "rgb", "both", "none"])
    trial.suggest_categorical("model.fusion.mixer", ["conv1d", "none", "attention_pool"])
    trial.suggest_float("model.fusion.dropout", 0.0, 0.4)
    heatmap_space(trial, base)


def heatmap_space(trial: optuna.trial.BaseTrial, base: Config) -> None:
    """How landmarks become heatmaps: width of a point, blur, which points, colour."""
    trial.suggest_float("data.heatmap.sigma_px", 0.5, 3.0)
    trial.suggest_int("data.heatmap.window_px", 2, 7)
    trial.suggest_categorical("data.heatmap.blur_px", [0, 3, 5, 7])
    trial.suggest_categorical("data.heatmap.points", ["all", "eyes_brows", "mouth", "nose"])
    trial.suggest_categorical("data.heatmap.colour", ["jet", "grey"])


STUDIES: dict[str, Study] = {
    "fusion_search": Study(
        name="fusion_search",
        about="how the RGB and heatmap streams are fused, and how heatmaps are drawn",
        space=fusion_space,
    ),
    "heatmap_search": Study(
        name="heatmap_search",
        about="how heatmaps are drawn, with the preset's fusion",
        space=heatmap_space,
    ),
}


def find_study(name: str) -> Study:
    """The study with this name.

    Raises:
        ConfigError: there is none; the nearest name is offered.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"a study must be one of {', '.join(STUDIES)}, got {name!r}.{hint}")
    return STUDIES[name]
