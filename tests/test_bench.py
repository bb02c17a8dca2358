"""The benchmarks run, and what they print and write is what they say. No test looks at a time."""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from qafe.config import paper, tiny
from qafe.data.sample import SampleConfig, make_sample
from qafe.errors import ConfigError

from . import reference
from .bench import __main__ as command
from .bench import clips, device, growth, heatmaps, jpeg, memory, published, recorded, search, step, sweeps, tracking
from .bench.rounds import Row


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QAFE_REFERENCE", str(tmp_path / "none"))
    monkeypatch.setattr(heatmaps, "FRAMES", 4)
    monkeypatch.setattr(recorded, "kernel_cpu_s", lambda: 0.5)


def test_a_table_and_its_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    assert command.main(["--rounds", "1", "heatmaps", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    for word in ("what", "ours", "published", "ratio", "recorded", "785.0 ms", "not scaled", "heatmaps, 64 px grey"):
        assert word in shown
    content = json.loads(file.read_text())
    assert content["machine"]["cores"]
    assert content["recorded"]["scaled"] is False
    assert content["recorded"]["kernel_cpu_s_here"] == 0.5
    assert len(content["rows"]) == 4
    for row in content["rows"]:
        assert row["what"].startswith("heatmaps, ")
        assert row["rival"] == "rewritten"
        assert row["rounds"] == 1
        assert row["ratio"] == pytest.approx(row["rival_s"] / row["ours_s"])
    assert [row["recorded_s"] for row in content["rows"]] == [0.785, None, None, None]


def test_without_a_subject_all_run_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = []

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(arguments[3])
        inner = command._parser().parse_args(arguments[3:])
        assert inner.inner
        assert (inner.rounds, inner.preset, inner.batch4) == (2, "small", True)
        rows = [Row(f"{inner.subject}, batch 1, paper", "clip", [1.0, 2.0], [4.0, 4.0]).as_json()]
        inner.json.write_text(json.dumps({"rows": rows, "left_out": [f"something of {inner.subject}"]}))
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(subprocess, "run", run)
    file = tmp_path / "all.json"
    assert command.main(["--rounds", "2", "--preset", "small", "--batch4", "--json", str(file)]) == 0
    assert seen == ["heatmaps", "clips", "step"]
    assert capsys.readouterr().out.count("left out: something of") == 3
    assert [row["ratio"] for row in json.loads(file.read_text())["rows"]] == [3.0] * 3


def test_a_subject_that_refuses_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--device", "nonsense"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: the device must be")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--published", "/nowhere"], "models/ST_Former.py"),
        (["step", "--published", "/nowhere"], "--published must be"),
        (["--device", "cpu", "clips"], "--device is for"),
        (["--device", "nonsense", "heatmaps"], "nonsense"),
        (["--rounds", "0", "heatmaps"], "--rounds must be"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert word in said[0]


def test_rows_survive_json_with_and_without_a_rival() -> None:
    row = Row("what", "clip", [1.0, 3.0, 2.0], [2.0, 6.0, 8.0], notes=["note"], recorded=5.0)
    assert statistics.median(row.ratios) == 2.0
    alone = Row("peak", "process", [1.5], [], quantity="GB")
    assert alone.ratios == []
    assert alone.as_json()["ratio"] is None
    for one in (row, alone):
        assert Row.from_json(json.loads(json.dumps(one.as_json()))) == one


def test_recorded_numbers_are_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QAFE_REFERENCE")
    found = {run["part"]: run for run in reference.table("bench_reference")["runs"]}
    loader = found["loader"]
    wanted = [
        found["heatmap"]["ms_per_80_frame_clip"]["cpu_median_ms"] / 1e3,
        (loader["train.rgb_clip"]["cpu_median_ms"] + loader["train.heatmap_clip"]["cpu_median_ms"]) / 1e3,
        found["train 1 8"]["step_unsplit"]["cpu_median_ms"] / 1e3,
        found["infer 1 8"]["total"]["cpu_median_ms"] / 1e3,
        found["train 1 8"]["peak_rss_MB"] / 1e3,
    ]
    assert [value for *_, value in recorded.RECORDED] == pytest.approx(wanted, rel=5e-3)


def test_the_kernel_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < recorded.kernel_cpu_s(1) < 60
    assert torch.get_num_threads() == 1


def test_recorded_numbers_go_to_the_rows_that_they_are_of() -> None:
    rows = [
        Row(f"training step fp32, batch {clips}, {preset}", "step", [1.0], [1.0])
        for clips, preset in ((1, "paper"), (4, "paper"), (1, "tiny"))
    ]
    recorded.attach(rows)
    assert [row.recorded for row in rows] == [18.5, None, None]


def test_growth_at_the_smallest_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series = growth.bench(
        preset="tiny", clip_preset="tiny", frames=(16, 32), batches=(1, 2), clips=(1, 2), workers=(0, 1), min_run_s=0.01
    )
    assert {one.axis for one in series} == set(growth.AXES)
    for one in series:
        assert len(one.at) == len(one.seconds) == 2
        assert min(one.seconds) > 0
        assert math.isfinite(one.slope)
    file = tmp_path / "growth.png"
    growth.figure(series, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    command.Console(width=140).print(command._growth_table(series))
    shown = capsys.readouterr().out
    assert "clip pair from the cache" in shown
    assert "n^" in shown
    assert "ms a worker" in shown


def test_slopes() -> None:
    square = growth.Series("", "batch", "", [1, 2, 4], [3.0, 12.0, 48.0])
    assert square.slope == pytest.approx(2)
    line = growth.Series("", "workers", "", [0, 1, 2], [3.0, 2.5, 2.0])
    assert line.slope == pytest.approx(-0.5)
    assert line.as_json()["slope_is"] == "s/worker"


def test_growth_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [growth.Series("drawing", axis, "clip", [1, 2], [0.1, 0.2]) for axis in growth.AXES]
    monkeypatch.setattr(command, "growth", lambda preset: one if preset == "tiny" else [])
    arguments = ["growth", "--preset", "tiny", "--plot", str(tmp_path / "g.png"), "--json", str(tmp_path / "g.json")]
    assert command.main(arguments) == 0
    assert "1: 100.0 ms, 2: 200.0 ms" in capsys.readouterr().out
    assert (tmp_path / "g.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "g.json").read_text())["series"][0]["slope"] == pytest.approx(1)


def test_one_measurement_of_each_kind() -> None:
    for kind, how in (("train", "published"), ("train", "fp32"), ("train", "checkpoint"), ("infer", "fp32")):
        found = step.measure(step.Measurement("tiny", kind, how, 1, 1))
        assert min(found.values()) > 0
        assert set(found) == {"cpu_s", "wall_s", "peak_gb"}


def test_a_bf16_step_says_what_bf16_can_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> dict[str, float]:
        return {"cpu_s": 1.0, "wall_s": 1.0, "peak_gb": 1.0}

    monkeypatch.setattr(step.Measurement, "in_own_process", measured)
    monkeypatch.setattr(step, "_has_bf16", lambda: True)
    notes = {row.what: row.notes for row in step.bench("tiny", 1, 1, batch4=False).rows}
    assert re.search(r"\d GFLOP/s in bf16, [1-9]\d* in float32", notes["training step bf16, batch 1, tiny"][-1])
    assert len(notes["training step fp32, batch 1, tiny"]) == 1


def test_a_step_has_the_recorded_operations() -> None:
    assert device.step_flop("paper") == pytest.approx(1049e9, rel=1e-3)


def test_heatmaps_on_a_device() -> None:
    found = device.heatmaps("cpu", 1, batches=(1, 2), min_run_s=0.01)
    assert len(found.rows) == 8
    assert all("clips/s" in row.notes[0] for row in found.rows)


def test_steps_on_a_device_say_floor_and_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(wanted: step.Measurement, _: Path | None) -> dict[str, float]:
        return {} if wanted.clips == 2 and wanted.how == "fp32" else {"cpu_s": 1.0, "wall_s": 2.0, "peak_gb": 3.0}

    monkeypatch.setattr(step.Measurement, "in_own_process", measured)
    monkeypatch.setattr(device, "matmul_tflops", lambda *_: 1e-4)
    monkeypatch.setattr(device, "_has_bf16", lambda: False)
    found = device.step("cpu", "tiny", 2, 1, batches=(1, 2, 4))
    assert [row.what for row in found.rows] == [
        "training step fp32, batch 1, tiny, cpu",
        "peak memory fp32, batch 1, tiny, cpu",
    ]
    assert found.rows[0].notes[0] == "0.50 clips/s"
    assert "26% of it reached" in found.rows[0].notes[1]
    assert any("fp32 from batch 2 on" in sentence for sentence in found.left_out)
    assert step.NO_BF16 in found.left_out


def test_batch_4_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "available_gb", lambda: 14.0)
    assert "--batch4" in str(step._no_batch4("paper", False))
    assert "14 GB are available" in str(step._no_batch4("paper", True))
    monkeypatch.setattr(step, "available_gb", lambda: 21.0)
    assert step._no_batch4("paper", True) is None


STAND_IN = """
import torch

class {kind}(torch.nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        assert arguments == {arguments}
        self.weight = torch.nn.Parameter(torch.zeros({parameters}))

    def forward(self, *inputs):
        {forward}
"""
FORWARDS = {
    "rgb": "return inputs[0].mean((1, 2, 3, 4))[:, None] + self.weight[:512]",
    "heatmap": "return inputs[0].mean(1, keepdim=True) + self.weight[:512, None, None, None]",
    "decoder": "heatmap, rgb = inputs; return torch.cat((heatmap, 10 * rgb), 1)",
    "evaluator": "return inputs[0].mean(2, keepdim=True)",
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is laid out as the authors' is, with something else in it."""
    for name, file, kind, arguments, parameters in published.MODULES:
        text = STAND_IN.format(kind=kind, arguments=arguments, parameters=parameters, forward=FORWARDS[name])
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]


def test_the_authors_network_is_called_as_published(stand_in: Path) -> None:
    network = published.Published(stand_in)
    rgb, maps = torch.rand(2, 3, 80, 4, 4), torch.rand(2, 3, 80, 2, 2)
    score = network(rgb, maps)
    expected = (10 * rgb.mean((1, 2, 3, 4)) + maps.mean((1, 2, 3, 4))) / 2
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize(("old", "new"), [("164353", "7"), ("import torch\n", "import torch, mmcv_is_not_here\n")])
def test_another_network_is_refused(stand_in: Path, old: str, new: str) -> None:
    file = stand_in / "models" / "evaluator.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError, match="Evaluator"):
        published.Published(stand_in)


def test_the_authors_network_has_one_size(stand_in: Path) -> None:
    with pytest.raises(ConfigError, match="paper"):
        step.bench("tiny", 1, 1, False, stand_in)


def test_options_stand_before_or_after_the_subject() -> None:
    parser: argparse.ArgumentParser = command._parser()
    assert parser.parse_args(["--rounds", "3", "faces", "a.mp4", "b.mp4"]).videos == [Path("a.mp4"), Path("b.mp4")]
    assert parser.parse_args(["--rounds", "3", "clips"]).rounds == 3
    assert parser.parse_args(["step", "--rounds", "3", "--batch4"]).batch4
    assert parser.parse_args(["--batch4", "step"]).batch4


def test_a_training_is_run_once() -> None:
    trained: list[tuple[str, int]] = []

    def learn(settings: dict[str, Any]) -> Iterator[tuple[float, float]]:
        for epoch in range(4):
            trained.append((settings["a"], epoch))
            yield float(epoch), 0.0

    remembered = search.once(learn)
    first = remembered({"a": "x", "b": 1})
    assert [next(first)[0] for _ in range(2)] == [0, 1]
    assert [seen for seen, _ in remembered({"b": 1, "a": "x"})] == [0, 1, 2, 3]
    assert next(remembered({"a": "y", "b": 1}))[0] == 0
    assert trained == [*(("x", epoch) for epoch in range(4)), ("y", 0)]


def test_a_search_ends_at_the_epoch_that_reaches_the_target() -> None:
    def learn(settings: dict[str, Any]) -> Iterator[tuple[float, float]]:
        return iter([(0.1 * epoch, 0.2 * epoch) for epoch in range(1, search.EPOCHS + 1)])

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    spent, best = search.search("random", "none", 0, paper(), learn, budget=60, target=1.0)
    assert (spent, best) == (5, 1.0)
    spent, best = search.search("tpe", "asha", 0, paper(), learn, budget=2 * search.EPOCHS)
    assert spent >= 2 * search.EPOCHS, "no model is good enough"
    assert best == pytest.approx(0.2 * search.EPOCHS)


def test_the_synthetic_objective_has_its_optimum_where_it_says() -> None:
    assert search.true_score(search.OPTIMUM) == 0.9
    for name in search.OPTIMUM:
        assert search.true_score({**search.OPTIMUM, name: -100 if name in search.REACH else "other"}) < 0.9


def test_searches_on_real_trainings_at_the_smallest_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search, "EPOCHS", 5)
    monkeypatch.setattr(search, "SAMPLE_TRIALS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process: other tests have theirs
    data = make_sample(tmp_path / "sample", SampleConfig(train_patients=6, test_patients=1, clips=2), workers=1)
    spent, target = search._on_sample(0, data)
    assert 1 <= spent <= search.LONGEST * 10 + 4
    assert -1 <= target <= 1


def test_tracking_at_the_smallest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OUR_EPOCHS", 4), ("RIVAL_EPOCHS", 2), ("EPOCHS_OF_A_MINUTE", 2)):
        monkeypatch.setattr(tracking, name, value)
    monkeypatch.setattr(tracking.postgres, "installed", lambda: False)
    found = tracking.bench(rounds=1)
    assert len(found.rows) >= 4
    for row in found.rows:
        assert min(row.ours) > 0
        assert not row.rival or min(row.rival) > 0


@pytest.mark.slow
def test_sweeps_at_the_smallest_size(tmp_path: Path) -> None:
    found = sweeps.bench(short_trials=20, long_trials=0, workers=2, figure=tmp_path / "figure.png")
    assert len(found.rows) == 1
    assert found.rows[0].ours[0] > found.rows[0].rival[0] > 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_decoders_are_compared_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "FILES", 2)
    turbo = types.ModuleType("turbojpeg")
    turbo.TJPF_RGB = 0  # type: ignore[attr-defined]
    turbo.TurboJPEG = lambda: types.SimpleNamespace(decode=lambda file, pixel_format: jpeg._opencv(file))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "turbojpeg", turbo)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # as if it were not installed
    found = jpeg.bench(1)
    assert [row.rival_name for row in found.rows] == ["OpenCV", "Pillow", "PyTurboJPEG"] * 2
    assert {note for row in found.rows for note in row.notes} == {"largest difference: 0 levels"}
    assert len({row.what for row in found.rows}) == 2
    assert [why.partition(":")[0] for why in found.left_out] == ["torchcodec"]


def test_waiting_for_clips_is_timed_and_profiled(monkeypatch: pytest.MonkeyPatch, sample_root: Path) -> None:
    monkeypatch.setattr(clips, "small", tiny)
    row = clips._training(sample_root, epochs=3)
    assert len(row.ours) == len(row.rival) == 2
    assert all(0 < waited < epoch for waited, epoch in zip(row.ours, row.rival, strict=True))
    (told,) = (note for note in row.notes if note.startswith("torch.profiler"))
    shares = [float(share) for share in re.findall(r"([\d.]+)%", told)]
    assert len(shares) == 2
    assert all(0 < share < 100 for share in shares)


def test_memory_takes_turns_of_two_processes_that_stay() -> None:
    rows = memory.bench("tiny", 2, 1)
    assert [row.what for row in rows] == [f"training step, tiny, {how}, 1 threads" for how in ("fp32", "bf16")]
    assert all(len(row.ours) == len(row.rival) == 2 and min(row.ours + row.rival) > 0 for row in rows)
