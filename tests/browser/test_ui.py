"""What people see in the MLflow UI after a sweep: ``pytest -m browser`` (needs Debian's chromium)."""

from pathlib import Path

import pytest

from tests.sweeps.test_sweep import Sweep, command
from tests.tracking.stores import free_port, server

from .screens import chromium, take_all

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="no chromium on this machine (apt-get install chromium)"),
]


def test_the_ui_shows_trials_report_figures_comparison_and_champion(sample_root: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, sample_root, "--trials", "5")
    sweep.run()
    for line in (["register", "--sweep", "s-1"], ["promote", "qafe-net", "1"]):
        assert command(sweep, "tracking.registry", *line).returncode == 0
    with server(tmp_path, free_port()) as uri:
        taken = take_all(uri, tmp_path / "screens")
    assert [path.stem for path in taken] == ["experiment", "report", "parallel", "trial", "compare", "registry"]
    assert all(path.stat().st_size < 250_000 for path in taken)
