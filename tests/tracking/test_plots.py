"""A trial's figures, from a history made by hand: what they show, not only that they are there."""

from typing import Any

import numpy as np
import pytest
import torch

from qafe.config import Config
from qafe.data.heatmap import draw
from qafe.dotted import override
from qafe.history import Epoch, ExpressionHistory
from tracking import plots
from tracking.pseudonyms import pseudonym

KEY = b"key"


def history(**changes: Any) -> dict[str, ExpressionHistory]:
    entry = ExpressionHistory(
        ids=[f"clip{number}" for number in range(6)],
        patients=["anna", "anna", "bert", "bert", "carl", "carl"],
        target=[0, 1, 2, 3, 4, 4],
        **changes,
    )
    for number, (spearman, scores) in enumerate([(0.5, [0.0] * 6), (0.9, [0.2, 0.8, 2.6, 2.5, 5.5, 3.0])], start=1):
        entry.epochs.append(
            Epoch(epoch=number, train_loss=2.0 / number, metrics={"spearman": spearman}, predictions=scores)
        )
    entry.best_epoch = 2
    return {"smile": entry}


def words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_every_trial_has_its_figures_and_no_name(quick: Config) -> None:
    attention = {"layer 1: rgb reads heatmap": [[0.25, 0.75], [0.5, 0.5]]}
    figures = plots.draw_figures(history(attention=attention), quick, KEY)
    names = {"predicted_against_true", "spearman_over_epochs", "confusion", "residuals_per_patient", "example_heatmap"}
    assert set(figures) == names | {"fusion_attention"}
    for figure in figures.values():
        assert not [name for name in ("anna", "bert", "carl", "clip0") if name in words(figure)]
    assert set(plots.draw_figures(history(), quick, KEY)) == names, "a fusion without attention has no such figure"
    assert plots.draw_figures({"smile": ExpressionHistory(ids=[], patients=[], target=[])}, quick, KEY) == {}


def test_the_best_epoch_has_its_band() -> None:
    figure = plots.draw_epochs(history())
    upper, lower = figure.axes
    assert upper.lines[1].get_ydata().tolist() == [0.5, 0.9]
    assert [line.get_xdata().tolist() for line in upper.lines if line.get_marker() == "o"] == [[2]]
    low, high = plots.metrics.spearman_interval([0.2, 0.8, 2.6, 2.5, 5.5, 3.0], [0, 1, 2, 3, 4, 4], list("aabbcc"))
    box = upper.patches[0].get_bbox()
    assert (box.y0, box.y1) == pytest.approx((low, high))
    assert lower.lines[0].get_ydata().tolist() == [2.0, 1.0]


def test_confusion_counts_are_drawn() -> None:
    (axes,) = plots.draw_confusion(history()).axes
    drawn = {text.get_position(): text.get_text() for text in axes.texts}
    # (predicted, true): 0.2 is 0, 0.8 is 1, 2.6 and 2.5 are 3, 5.5 is 4 at most.
    assert drawn == {(0, 0): "1", (1, 1): "1", (3, 2): "1", (3, 3): "1", (4, 4): "1", (3, 4): "1"}
    assert axes.images[0].get_array()[4].tolist() == [0, 0, 0, 0.5, 0.5]
    assert "67% exact" in axes.get_title()


def test_residuals_are_sorted_by_their_medians() -> None:
    found = plots.residuals_by_patient(history()["smile"], KEY)
    assert [name for name, _ in found] == [pseudonym(name, KEY) for name in ("anna", "bert", "carl")]
    assert [residuals for _, residuals in found] == [
        pytest.approx([0.2, -0.2]),
        pytest.approx([0.6, -0.5]),
        pytest.approx([1.5, -1.0]),
    ]
    (axes,) = plots.draw_residuals(history(), KEY).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [name for name, _ in found]
    medians = [line.get_xdata()[0] for line in axes.lines[1:6:2]]
    assert medians == pytest.approx([0.0, 0.05, 0.25])


def test_attention_is_drawn_as_it_is(quick: Config) -> None:
    attention = {"layer 1: rgb reads heatmap": [[0.25, 0.75], [0.5, 0.5]], "pool": [[0.1, 0.2, 0.3, 0.4]]}
    first, second = plots.draw_attention(history(attention=attention), quick).axes
    assert first.images[0].get_array().tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert (first.get_xlabel(), first.get_ylabel()) == ("heatmap segment", "rgb segment")
    assert [text.get_text() for text in first.texts] == ["0.25", "0.75", "0.50", "0.50"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["h1", "h2", "r1", "r2"]


def test_the_example_heatmap_shows_the_trials_settings_on_nobodys_face(quick: Config) -> None:
    wide = override(quick, {"data.heatmap.sigma_px": 2.5, "data.heatmap.colour": "jet", "data.heatmap.points": "mouth"})
    figure = plots.draw_heatmap(wide)
    assert "mouth points, jet, sigma 2.5 px" in words(figure)
    frames = [axes.images[0].get_array() for axes in figure.axes]
    assert all(frame.ndim == 2 and frame.max() == 1 for frame in frames)
    assert not np.array_equal(frames[0], frames[2]), "the face moves"
    narrow = plots.draw_heatmap(quick).axes[0].images[0]
    assert (narrow.get_array() > 0.5).sum() != (frames[0] > 0.5).sum()
    assert narrow.get_cmap().name == "gray"
    # JET's two ends: dark blue and dark red.
    jet = figure.axes[0].images[0].get_cmap()
    assert [tuple(round(255 * part) for part in jet(end)[:3]) for end in (0.0, 1.0)] == [(0, 0, 128), (128, 0, 0)]
    clip = plots.make_clip(plots.SampleConfig(frames=(16, 16)), 0, 1, 0, 0.0)
    mouth = clip.landmarks[:1, list(plots.columns("mouth", 106))] * (wide.data.heatmap.canvas_px / 256)
    np.testing.assert_array_equal(frames[0], draw(torch.from_numpy(mouth), wide.data.heatmap)[0].numpy())
