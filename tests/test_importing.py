"""The authors' own model: imported, scored, trained on, registered, promoted and scored from the registry."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from qafe.__main__ import main
from qafe.config import tiny
from qafe.dotted import from_json, override, to_json
from qafe.importing import SOURCE_KEY, published_config
from qafe.model import weights
from qafe.model.qafenet import build
from qafe.score import Scorer
from qafe.store import Store
from tests import reference
from tests.tracking.stores import embedded
from tracking import registry

QUICK = ["--set", "train.epochs=1", "--set", "data.repeats=1", "--set", "train.precision=fp32"]


def authors_file(path: Path) -> Path:
    """Fresh random weights under the authors' names, which our own rules give."""
    torch.manual_seed(3)
    model = build(published_config())
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in weights.REFERENCE_MODULES}
    for ours, theirs in weights.reference_keys(model).items():
        module, _, key = theirs.partition(".")
        states[module]["module." + key] = model.state_dict()[ours]
    torch.save({"epoch": 7, **states}, path)
    return path


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authors_file(tmp_path_factory.mktemp("authors") / "smile.pth")


@pytest.fixture(scope="module")
def imported(authors: Path) -> Path:
    out = authors.parent / "imported"
    assert main(["import", str(authors), "--expression", "smile", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def clip(sample_root: Path) -> Path:
    store = Store(sample_root)
    patient, video = next(found for found in store.videos() if "smile" in found[1])
    return sample_root / "frames" / patient / video


def test_an_imported_model_is_what_the_loader_gives(authors: Path, imported: Path, clip: Path) -> None:
    assert sorted(path.name for path in imported.iterdir()) == ["config.json", "smile.safetensors"]
    model, config, notes = weights.load(imported / "smile.safetensors")
    assert config == published_config() == from_json((imported / "config.json").read_text())
    assert config.model.rgb_axis_order == "reference"
    assert config.data.heatmap.skip_first
    assert notes == {SOURCE_KEY: hashlib.sha256(authors.read_bytes()).hexdigest()}
    direct = build(published_config())
    weights.load_reference_checkpoint(direct, authors)
    for name, value in direct.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_from_their_file_to_the_champion(
    imported: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", embedded(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = Scorer(imported).score_clip(clip)
    assert main(["score", str(clip), "--model", str(imported), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(expected, abs=1e-5)
    assert registry.main(["register", "--weights", str(imported)]) == 0
    assert registry.main(["promote", "qafe-net", "1"]) == 0
    capsys.readouterr()
    assert main(["score", str(clip), "--model", "models:/qafe-net@champion", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(expected, abs=1e-5)
    assert registry.main(["list", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["validation_spearman"], row["test_spearman"], row["alias"]) == ("", "", "champion")
    client = MlflowClient(embedded(tmp_path))
    version = client.get_model_version("qafe-net", "1")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {}
    assert run.data.params["model.rgb_axis_order"] == "reference"
    said = json.dumps([run.data.tags, run.data.params, version.tags])
    assert str(imported) not in said
    assert str(Path.home()) not in said


def test_the_published_key_lists_are_imported(clip: Path, tmp_path: Path) -> None:
    torch.save({"epoch": 1, **reference.state_dicts()}, tmp_path / "authors.pth")
    out = tmp_path / "out"
    assert main(["import", str(tmp_path / "authors.pth"), "--expression", "smile", str(out)]) == 0
    net = reference.model("reference", torch.float32, tmp_path)
    for name, value in weights.load(out / "smile.safetensors")[0].state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_training_goes_on_from_a_model(sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data-root", str(sample_root), "--expression", "smile"]
    config = override(tiny(), {"train.epochs": 1, "train.lr": 1e-9, "train.weight_decay": 0})
    start = tmp_path / "start"
    start.mkdir()
    torch.manual_seed(11)
    begun = build(config)
    weights.save(start / "smile.safetensors", begun, config)
    (start / "config.json").write_text(to_json(config))
    out = tmp_path / "out"
    assert main(["train", *data, "--init", str(start), "--out", str(out)]) == 0
    ended = weights.load(out / "smile.safetensors")[0].state_dict()
    trained = [name for name, _ in begun.named_parameters()]
    for name in trained:
        assert torch.allclose(ended[name], begun.state_dict()[name], atol=1e-6), name
    capsys.readouterr()
    for flags, words in (
        (["--preset", "tiny"], "--init has settings of its own"),
        (["--set", "model.fusion.width=32"], "Use a file of the same model"),
        (["--expression", "frown"], "has smile and not frown"),
    ):
        assert main(["train", *data, "--init", str(start), *flags]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ")
        assert words in said
    assert main(["train", *data, "--init", str(tmp_path / "nowhere")]) == 2
    assert "a model folder must hold its settings" in capsys.readouterr().err


def test_what_is_no_model_of_theirs_gets_one_line(
    authors: Path, imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.pth").write_bytes(authors.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    for name in ("cut.pth", "text.pth", "other.pth", "missing.pth", "."):
        assert main(["import", str(tmp_path / name), "--expression", "smile", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()
    for expression in ("smile,frown", "a/b", "all", ""):
        assert main(["import", str(authors), "--expression", expression, str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["import", str(authors), "--expression", "smile", str(imported)]) == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".pth"]
