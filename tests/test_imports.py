"""Who may import whom (the rules of the design, read from the source)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qafe", "sweeps", "tracking")


def modules() -> dict[str, Path]:
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert len(found) > 30
    return found


def imports(module: str, path: Path, *, top_level: bool = False) -> set[str]:
    """Absolute names of all that a module imports, inside functions too."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names} | {start}
    return names


def offenders(importers: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, path in modules().items()
        if (module == importers or module.startswith(importers + ".")) and module not in allowed
        for name in imports(module, path)
        if any(name == bad or name.startswith(bad + ".") for bad in forbidden)
    ]


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        ("qafe.errors", ("qafe", "torch", "numpy")),
        ("qafe.config", ("torch", "numpy", "qafe.store", "qafe.data", "qafe.model", "qafe.train")),
        ("qafe.dotted", ("torch", "numpy", "qafe.store", "qafe.data", "qafe.model", "qafe.train")),
        ("qafe.faces", ("qafe.data", "qafe.model")),
        ("qafe.data", ("qafe.faces", "qafe.model")),
        ("qafe.losses", ("qafe.data", "qafe.store", "logging", "os", "time", "pathlib")),
        ("qafe.metrics", ("qafe.data", "qafe.store", "logging", "os", "time", "pathlib", "torch")),
        ("qafe.selection", ("qafe.data", "qafe.store", "logging", "os", "time", "pathlib", "torch")),
        ("qafe", ("mlflow", "ray", "optuna", "tracking", "sweeps")),
        ("tracking", ("ray", "optuna", "sweeps")),
        ("sweeps", ("mlflow",)),
    ],
)
def test_rooms_keep_to_their_imports(importers: str, forbidden: tuple[str, ...]) -> None:
    assert offenders(importers, forbidden) == []


def test_the_model_touches_no_disk_clock_or_logger() -> None:
    forbidden = ("logging", "os", "time", "pathlib", "tempfile", "qafe.store", "qafe.data")
    assert offenders("qafe.model", forbidden, allowed=("qafe.model.weights",)) == []


def test_a_trials_worker_loads_only_what_a_trial_needs() -> None:
    code = (
        "import sys, sweeps.trial; print([name for name in ('mlflow', 'matplotlib', 'plotly') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_says_nothing_in_its_name() -> None:
    assert [m for m in modules() if m.rpartition(".")[2] in ("utils", "helpers", "common", "misc")] == []
