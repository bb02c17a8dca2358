"""What the command line plans, without starting it."""

from pathlib import Path

import pytest

import sweeps.driver
from qafe.config import from_json
from sweeps.plan import Plan
from sweeps.run import main
from tests.conftest import QUICK_FLAGS
from tests.tracking.stores import embedded


@pytest.mark.parametrize(("flags", "cached"), [([], True), (["--no-cache"], False)])
def test_no_cache_reaches_every_trial(
    flags: list[str], cached: bool, sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(sweeps.driver, "run_sweep", lambda plan, study, **_: plans.append(plan) or 0)
    line = ["fusion_search", "--data-root", str(sample_root), "--storage", str(tmp_path), "--preset", "tiny"]
    assert main([*line, "--tracking-uri", embedded(tmp_path), *QUICK_FLAGS, *flags]) == 0
    assert (from_json(plans[0].config_json).data.cache_gb > 0) == cached


def test_a_resumed_sweep_keeps_its_cache(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeps.driver, "run_sweep", lambda *_, **__: 0)
    line = ["fusion_search", "--storage", str(tmp_path)]
    flags = ["--data-root", str(sample_root), "--preset", "tiny", "--tracking-uri", embedded(tmp_path), *QUICK_FLAGS]
    assert main([*line, *flags]) == 0
    assert main([*line, "--resume", "--no-cache"]) == 2
    assert "--no-cache with --resume" in capsys.readouterr().err


def test_a_bucket_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fusion_search", "--storage", "s3://bucket/sweeps"]) == 2
    assert "Mount the bucket" in capsys.readouterr().err
