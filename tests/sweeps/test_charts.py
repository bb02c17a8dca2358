"""The charts of a sweep's report, from trials made by hand: what they show, not only that they are there."""

import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from sweeps import charts, page, report
from sweeps.charts import Sweep
from sweeps.refresh import EVERY_S, RefreshReport
from sweeps.report import TrialSummary
from sweeps.svg import Scale, shade
from sweeps.timeline import STRETCHES, NoteWorkers, Stretch, lanes, stretches_of, without_gaps

from .test_report import summary_with


def trial(number: int, objective: float | None, state: str = "finished", **more: Any) -> TrialSummary:
    given = {"epochs": 3, "settings": {}, "baseline": False, "seconds": 3600.0, "ended": 1000.0 + number}
    return TrialSummary(number=number, state=state, objective=objective, **given | more)


def sweep(rows: list[TrialSummary], importances: dict[str, float] | None = None, **summary: Any) -> Sweep:
    given = summary_with(0.6, 0.5, None) | {"luck": None} | summary
    ordered = sorted(rows, key=lambda row: (row.objective is None, -(row.objective or 0.0)))
    return Sweep(ordered, importances or {}, given)


def drawn(chart: charts.Chart | None) -> ElementTree.Element:
    assert chart is not None
    return ElementTree.fromstring(f"<all>{chart.body}</all>")


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def of_class(chart: charts.Chart | None, kind: str) -> list[ElementTree.Element]:
    return [
        part
        for part in drawn(chart).iter()
        if kind in part.get("class", "").split() and part.tag in ("polyline", "polygon", "circle")
    ]


def test_the_best_so_far_has_its_cost_random_orders_and_luck_beside_it() -> None:
    scores = [0.2, 0.5, 0.1, 0.9]
    rows = [trial(number, score) for number, score in enumerate(scores)]
    growth = [(0.1, 0.2), (0.15, 0.3), (0.2, 0.35), (0.25, 0.4)]
    luck = {"max_observed": 0.9, "threshold": 0.4, "expected_max": 0.25, "p_value": 0.01, "growth": growth}
    chart = charts.best_so_far(
        sweep(rows, luck=luck | {"trials": [0, 1, 2, 3]}, cost={"unit": "GPU-hours", "share": 0.5})
    )
    assert chart is not None
    assert chart.title == "Best so far against GPU-hours"
    # Half a GPU for an hour each: 0.5, 1, 1.5 and 2 GPU-hours; the scale goes from 0 to 2.
    x, y = Scale([0, 2.0], 50, 745, margin=0.02), Scale([0.1, 0.9], 285, 28, margin=0.03)
    (best,), (random,), (band,) = (of_class(chart, kind) for kind in ("best", "random", "luck"))
    steps = [(0.5, 0.2), (1.0, 0.2), (1.0, 0.5), (1.5, 0.5), (1.5, 0.5), (2.0, 0.5), (2.0, 0.9)]
    np.testing.assert_allclose(points(best), [(x.place(a), y.place(b)) for a, b in steps], atol=0.06)
    every = [np.mean([max(draw) for draw in itertools.combinations(scores, k)]) for k in (1, 2, 3, 4)]
    expected = [(x.place(0.5 * k), y.place(value)) for k, value in enumerate(every, start=1)]
    np.testing.assert_allclose(points(random), expected, atol=0.06)
    ends = [(x.place(0.5 * k), y.place(high)) for k, (_, high) in enumerate(growth, start=1)]
    ends += [(x.place(0.5 * k), y.place(low)) for k, (low, _) in reversed(list(enumerate(growth, start=1)))]
    np.testing.assert_allclose(points(band), ends, atol=0.06)
    assert "4 trials" in chart.caption
    assert charts.best_so_far(sweep([trial(0, None, "failed")])) is None


def test_trials_differ_in_shape_and_not_in_colour_alone() -> None:
    rows = [trial(0, 0.5), trial(1, 0.4, "pruned"), trial(2, 0.1, "failed")]
    chart = charts.best_so_far(sweep(rows))
    states = ("finished", "pruned", "failed")
    marks = {part.get("class"): part.tag for part in drawn(chart).iter() if part.get("class") in states}
    assert marks == {"finished": "circle", "pruned": "circle", "failed": "path"}
    titles = [part.text for part in drawn(chart).iter("title")]
    assert titles == ["trial 0, 0.500, finished after 3 epochs", "trial 1, 0.400, pruned after 3 epochs",
                      "trial 2, 0.100, failed after 3 epochs"]  # fmt: skip


def test_workers_have_lanes_and_no_names() -> None:
    rows = [
        (0, "finished", [Stretch("anna-pc:11", 0.0, 10.0)]),
        (1, "pruned", [Stretch("anna-pc:12", 1.0, 5.0)]),
        (2, "finished", [Stretch("anna-pc:12", 5.0, 9.0), Stretch("gpu-2:7", 12.0, 20.0)]),
        (3, "running", [Stretch("anna-pc:99", 30.0, 40.0)]),  # after a resume: another process
    ]
    found = lanes(rows)
    assert {name: [(bar.trial, bar.start) for bar in bars] for name, bars in found.items()} == {
        "node 1, worker 1": [(0, 0.0), (3, 30.0)],
        "node 1, worker 2": [(1, 1.0), (2, 5.0)],
        "node 2, worker 1": [(2, 12.0)],
    }
    chart = charts.timeline(sweep([trial(n, 0.5, state, stretches=tuple(spans)) for n, state, spans in rows]))
    assert chart is not None
    assert "anna" not in chart.body
    bars = [part for part in drawn(chart).iter("rect") if part.get("rx")]
    assert [bar.get("class") for bar in bars] == ["finished", "running", "pruned", "finished", "finished"]
    # 28 busy seconds, and of both gaps as much as 5 % of them: 30.8 s on the clock, in 628 px.
    widths = [float(bar.get("width", 0)) + 1 for bar in bars]
    np.testing.assert_allclose(widths, [628 * length / 30.8 for length in (10, 10, 4, 4, 8)], rtol=0.02)


def test_a_night_between_two_drivers_is_cut_short() -> None:
    clock, cuts = without_gaps([(100.0, 200.0), (150.0, 300.0), (36300.0, 36500.0)])
    assert [clock(moment) for moment in (100.0, 300.0)] == [0.0, 200.0]
    assert cuts == [(220.0, 35980.0)]  # 5 % of 400 busy seconds are left
    assert clock(36500.0) == pytest.approx(420.0)
    assert without_gaps([(0.0, 100.0), (103.0, 200.0)])[1] == []


def test_the_study_knows_where_its_trials_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    asked, now = study.ask(), [1000.0]
    notes: list[list[list[Any]]] = []

    def note(trial_id: str, name: str, value: Any) -> None:
        notes.append([list(row) for row in value])
        asked.set_user_attr(name, value)

    monkeypatch.setattr("sweeps.timeline.time.time", lambda: now[0])
    callback = NoteWorkers(SimpleNamespace(study=study, note=note))  # type: ignore[arg-type]
    ran = SimpleNamespace(config={"number": 0}, trial_id="t")
    for worker, moments in (("node:1", (1010.0, 1015.0, 1060.0)), ("node:2", (1100.0,))):
        callback.on_trial_start(0, [], ran)  # type: ignore[arg-type]
        for moment in moments:
            now[0] = moment
            callback.on_trial_result(0, [], ran, {"worker": worker})  # type: ignore[arg-type]
    assert notes == [
        [["node:1", 1000.0, 1010.0]],
        [["node:1", 1000.0, 1060.0]],  # the one at 1015 was too soon to be written
        [["node:1", 1000.0, 1060.0], ["node:2", 1060.0, 1100.0]],
    ]
    study.tell(asked, 0.5)
    (ended,) = study.trials
    assert ended.datetime_complete is not None
    first, second = stretches_of(ended)
    assert first == Stretch("node:1", 1000.0, 1060.0)
    assert second.end == ended.datetime_complete.timestamp()
    unknown = create_trial(value=0.1)
    assert [stretch.worker for stretch in stretches_of(unknown)] == [""]
    assert STRETCHES in ended.user_attrs


def test_failures_are_counted_by_class_and_name_no_file() -> None:
    study = optuna.create_study(direction="maximize")
    ends: list[dict[str, str]] = [
        {"failure": "memory", "reason": "MemoryError: a batch of one clip does not fit"},
        {"failure": "memory", "reason": "MemoryError: again"},
        {"failure": "data", "reason": "MediaError: /data/anna/a.jpg"},
        {"failure": "lost"},
    ]
    for attrs in ends:
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attrs))
    rows = report.summarise(study, Path("nowhere"), {})
    chart = charts.failures(sweep(rows))
    cells = [[cell.text for cell in row.iter("td")] for row in drawn(chart).iter("tr")][1:]
    assert [(row[0], row[1], row[3]) for row in cells] == [
        ("memory: MemoryError", "2", "0, 1"),
        ("data: MediaError", "1", "2"),
        ("lost", "1", "3"),
    ]
    assert chart is not None
    assert "anna" not in chart.body
    assert charts.failures(sweep([trial(0, 0.5)])) is None


def test_importances_are_bars_as_long_as_they_are() -> None:
    chart = charts.importances(sweep([trial(0, 0.5)], {"model.fusion.layers": 0.6, "data.heatmap.sigma_px": 0.3}))
    assert [float(bar.get("width", 0)) for bar in drawn(chart).iter("rect")] == [440.0, 220.0]
    assert [part.text for part in drawn(chart).iter("text")] == ["fusion.layers", "0.60", "heatmap.sigma_px", "0.30"]
    assert chart is not None
    assert "1 finished trials" in chart.caption


def test_parallel_coordinates_go_through_every_setting() -> None:
    rows = [
        trial(0, 0.1, settings={"kind": "sum", "lr": 0.001}),
        trial(1, 0.5, settings={"kind": "cross", "lr": 0.1, "heads": 4}),
    ]
    chart = charts.parallel_coordinates(Sweep(rows[::-1], {"lr": 1.0}, {}, frozenset({"lr"})))
    low, high = list(drawn(chart).iter("polyline"))
    # 300 is the lowest place and 56 the highest: score, lr, kind (cross, sum), heads (n/a, 4).
    assert [y for _, y in points(low)] == pytest.approx([300, 300, 117, 300 - 0.03 * 244], abs=0.06)
    assert [y for _, y in points(high)][:3] == pytest.approx([56, 56, 239], abs=0.06)
    assert low.get("class") == "l0"
    assert high.get("class") == "l5 top"
    assert "n/a" in [part.text for part in drawn(chart).iter("text")]
    assert charts.parallel_coordinates(sweep(rows[:1])) is None


def test_scales() -> None:
    scale = Scale([1.0, 100.0], 0, 10, log=True)
    assert [scale.place(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([0, 5, 10])
    assert [words for _, words in scale.ticks()] == ["1", "10", "100"]
    absent = Scale([0.0, None, 1.0], 0, 100)
    assert (absent.place(None), absent.place(0.0), absent.place(1.0)) == pytest.approx((3, 15, 100))
    assert absent.ticks()[0] == (pytest.approx(3), "n/a")
    levels = Scale(["b", None, "a"], 0, 30)
    assert [words for _, words in levels.ticks()] == ["n/a", "a", "b"]
    assert [levels.place(value) for value in (None, "a", "b")] == [5, 15, 25]
    assert [words for _, words in Scale([True, False], 0, 30).ticks()] == ["False", "True"]
    same = Scale([3, 3], 0, 10)
    assert same.ticks() == [(5, "3")]
    assert Scale([0.01, 0.01], 0, 10, log=True).ticks() == [(pytest.approx(5), "0.01")]
    assert [shade(value, 0.0, 1.0) for value in (0.0, 0.5, 1.0)] == [0, 3, 5]


def test_the_surface_is_the_mean_of_the_trials_around() -> None:
    places, values = np.array([[0.0, 0.0], [0.3, 0.0]]), np.array([1.0, 0.0])
    grid = np.array([[[0.0, 0.0], [0.15, 0.0], [0.3, 0.0], [0.9, 0.0]]])
    found = charts.smoothed(places, values, grid, (True, True))[0]
    near = math.exp(-0.5 * (0.3 / charts.REACH) ** 2)
    assert found[:3] == pytest.approx([1 / (1 + near), 0.5, near / (1 + near)])
    assert math.isnan(found[3]), "nobody was there"
    levels = charts.smoothed(places, values, grid, (False, True))[0]
    assert levels[[0, 2]].tolist() == [1.0, 0.0]
    assert math.isnan(levels[1])


def test_the_contour_shows_the_two_most_important_settings() -> None:
    rows = [
        trial(n, n / 10, settings={"a": n / 10, "b": "xy"[n % 2], "c": n, **({"d": 1.0} if n == 3 else {})})
        for n in range(8)
    ]
    chart = charts.contour(sweep(rows, {"a": 0.5, "b": 0.3, "c": 0.2}))
    assert chart is not None
    assert chart.title.endswith("a and b")
    assert len(of_class(chart, "dot")) == 8
    assert {"x", "y"} <= {part.text for part in drawn(chart).iter("text")}
    shades = [part.get("class") for part in drawn(chart).iter("rect")]
    assert shades[0] == "f0"
    assert len(set(shades)) > 3
    assert charts.contour(sweep(rows, {"d": 0.6, "a": 0.4})) is None, "one trial with both says nothing"
    assert charts.contour(sweep(rows, {"a": 1.0})) is None


def test_slices_have_a_mean_for_each_level() -> None:
    rows = [trial(n, n / 10, settings={"kind": "xy"[n % 2], "lr": n / 10}) for n in range(5)]
    chart = charts.slices(sweep(rows))
    assert len(list(drawn(chart).iter("svg"))) == 2
    means = [part.text for part in drawn(chart).iter("title") if part.text and part.text.startswith("mean")]
    assert sorted(means) == ["mean of 2: 0.200", "mean of 3: 0.200"]
    assert len(list(drawn(chart).iter("circle"))) == 10


def test_noise_is_drawn_split_by_split() -> None:
    rows = [trial(n, n / 10, settings={"train.seed": n, "data.split_seed": n // 2}) for n in range(4)]
    noise = {"mean": 0.15, "splits": 2}
    chart = charts.seed_noise(sweep(rows, noise=noise))
    assert [part.text for part in drawn(chart).iter("title")][-2:] == ["mean of 2: 0.050", "mean of 2: 0.250"]
    assert charts.seed_noise(sweep(rows)) is None


def test_fifty_trials_are_a_small_page_that_fetches_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize")
    space = {f"model.setting_{n}": FloatDistribution(0.001, 1, log=n % 2 == 0) for n in range(15)}
    for _number in range(50):
        params = {name: float(rng.uniform(0.001, 1)) for name in space}
        study.add_trial(
            create_trial(
                value=float(rng.normal()),
                params=params,
                distributions=space,
                user_attrs={"seconds": 60.0},
                intermediate_values=dict.fromkeys(range(1, 11), 0.1),
            )
        )
    trials = report.summarise(study, tmp_path, {})
    log = report.log_settings(study)
    assert log == {name for name in space if int(name.rpartition("_")[2]) % 2 == 0}
    page.write_report(tmp_path / "report", trials, report.importances(study), summary_with(0.6, 0.5, 0.4), log)
    path = tmp_path / "report" / "report.html"
    text = path.read_text()
    assert path.stat().st_size < 1_000_000
    assert not re.search(r"(src|href)=|@import|url\(|<script|<link", text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme:dark" in text
    pictures = re.findall(r"<svg role=\"img\"[^>]*>", text)
    assert len(pictures) > 15
    assert all(re.search(r'aria-label="[^"]+"', picture) for picture in pictures)


class Tracker:
    """Notes what it is given; ``sent`` says whether a server has taken all of it."""

    def __init__(self) -> None:
        self.sent = True
        self.files: list[dict[str, float]] = []

    def wait_until_sent(self, patience_s: float) -> bool:
        return self.sent

    def sweep_files(self, folder: Path, numbers: dict[str, float]) -> None:
        self.files.append(numbers)


def test_the_report_is_refreshed_seldom_and_never_piles_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, cpu, tracker = [0.0], [0.0], Tracker()

    def draw() -> None:
        cpu[0] += 2.0
        tracker.sweep_files(Path(), {})

    refresh = RefreshReport(None, None, tracker, clock=lambda: now[0], cpu_clock=lambda: cpu[0])  # type: ignore[arg-type]
    monkeypatch.setattr(refresh, "_draw", draw)

    def at(moment: float, ended: bool = True) -> int:
        now[0] = moment
        if ended:
            refresh.on_trial_complete(0, [], None)  # type: ignore[arg-type]
        refresh.on_step_end(0, [])
        refresh.close()
        return len(tracker.files)

    assert at(EVERY_S - 1) == 0, "too soon"
    assert at(EVERY_S, ended=False) == 1
    assert at(EVERY_S + 150) == 1, "it took 2 s, so 200 s must pass"
    assert at(EVERY_S + 200) == 2
    assert at(EVERY_S + 900, ended=False) == 2, "nothing new"
    tracker.sent = False
    assert at(2000) == 2, "the last one has not been sent"
    tracker.sent = True
    assert at(2060, ended=False) == 2, "the clock runs from the last try"
    assert at(2200, ended=False) == 3
    monkeypatch.setattr(refresh, "_draw", lambda: 1 / 0)
    assert at(5000) == 3, "a chart that fails ends no sweep"
    assert refresh.count == 4
