"""The studies that come with the project."""

from __future__ import annotations

import difflib

from qafe.config import ATTENTION_FUSIONS
from qafe.errors import ConfigError

from .sweep import Suggester, Sweep


def fusion_space(trial: Suggester) -> None:
    """How the two streams meet, and how landmarks are drawn.

    Layers, heads, MLP, direction and drop path exist only in the fusions that attend.
    """
    kind = trial.suggest_categorical("model.fusion.kind", ["cross", "cross_split", "gated", "concat", "sum"])
    if kind in ATTENTION_FUSIONS:
        trial.suggest_int("model.fusion.layers", 1, 4)
        width = trial.base.model.fusion.width
        trial.suggest_categorical("model.fusion.heads", [heads for heads in (1, 2, 4, 8) if width % heads == 0])
        trial.suggest_categorical("model.fusion.mlp_ratio", [1.0, 2.0, 4.0])
        trial.suggest_categorical("model.fusion.query", ["both", "rgb", "heatmap"])
        trial.suggest_float("model.fusion.drop_path", 0.0, 0.3)
    trial.suggest_categorical("model.fusion.position", ["heatmap", "rgb", "both", "none"])
    trial.suggest_categorical("model.fusion.mixer", ["conv1d", "none", "attention_pool"])
    trial.suggest_float("model.fusion.dropout", 0.0, 0.4)
    drawing_space(trial)


def heatmap_space(trial: Suggester) -> None:
    """How landmarks are drawn, and how large the encoder sees them."""
    drawing_space(trial)
    size = trial.base.model.heatmap.size_px
    trial.suggest_categorical("model.heatmap.size_px", sorted({max(8, 3 * size // 4), size, 3 * size // 2}))


def drawing_space(trial: Suggester) -> None:
    """How landmarks are drawn: width of a point, blur, which points, colour."""
    trial.suggest_float("data.heatmap.sigma_px", 0.5, 3.0)
    trial.suggest_int("data.heatmap.window_px", 2, 7)
    trial.suggest_categorical("data.heatmap.blur_px", [0, 3, 5, 7])
    trial.suggest_categorical("data.heatmap.points", ["all", "eyes_brows", "mouth", "nose"])
    trial.suggest_categorical("data.heatmap.colour", ["jet", "grey"])


STUDIES: dict[str, Sweep] = {
    "fusion_search": Sweep(
        name="fusion_search",
        about="how the RGB and heatmap streams are fused, and how heatmaps are drawn",
        space=fusion_space,
    ),
    "heatmap_search": Sweep(
        name="heatmap_search",
        about="how heatmaps are drawn and how large, with the preset's fusion",
        space=heatmap_space,
    ),
}


def find_study(name: str) -> Sweep:
    """The study with this name.

    Raises:
        ConfigError: there is none; the nearest name is offered.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"a study must be one of {', '.join(STUDIES)}, got {name!r}.{hint}")
    return STUDIES[name]
