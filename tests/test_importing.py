"""The authors' own model: imported, scored, trained on, registered, promoted and scored from the registry."""

import hashlib
import json
import re
import resource
import shlex
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from qafe.__main__ import main
from qafe.config import tiny
from qafe.data.dataset import load_clip
from qafe.dotted import from_json, override, to_json
from qafe.importing import SOURCE_KEY, published_config
from qafe.model import weights
from qafe.model.qafenet import build
from qafe.predict import score_batch
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
    authors: Path,
    imported: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", embedded(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    direct, config = build(published_config()), published_config()
    weights.load_reference_checkpoint(direct, authors)
    batch = load_clip(*Store.of_clip(clip), config)
    expected = float(score_batch(direct.eval(), batch, config, torch.device("cpu")).item())
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
    assert run.data.params["data.heatmap.skip_first"] == "True"
    assert not [name for name in run.data.params if name.startswith(registry.UNSEEN)]
    source = hashlib.sha256(authors.read_bytes()).hexdigest()
    assert run.data.tags["source_sha256"] == version.tags["source_sha256"] == f"smile:{source}"
    assert weights.load(registry.fetch("models:/qafe-net@champion") / "smile.safetensors")[2] == {SOURCE_KEY: source}
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


@pytest.mark.parametrize("fault", ["nan", "infinite", "complex", "sparse", "meta", "integer"])
def test_what_no_training_leaves_gets_one_line(
    fault: str, authors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(authors, weights_only=True)
    key = "module.evaluator.layer1.weight"
    whole = content["evaluator"][key]
    content["evaluator"][key] = {
        "nan": torch.where(whole == whole.max(), torch.nan, whole),
        "infinite": torch.where(whole == whole.max(), torch.inf, whole),
        "complex": whole.to(torch.complex64),
        "sparse": whole.to_sparse(),
        "meta": whole.to("meta"),
        "integer": whole.to(torch.int64),
    }[fault]
    torch.save(content, tmp_path / "authors.pth")
    assert main(["import", str(tmp_path / "authors.pth"), "--expression", "smile", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "evaluator.layer1.weight" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["authors.pth"]


def test_another_file_gets_a_short_line(authors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.load(authors, weights_only=True)["model"], tmp_path / "encoder.pth")
    assert main(["import", str(tmp_path / "encoder.pth"), "--expression", "smile", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"pos_embedding.* and \d+ more\)", said)
    assert len(said) < 900


def test_an_import_to_a_full_disk_gets_one_line(
    authors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main(["import", str(authors), "--expression", "smile", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_line_of_the_readme_imports_two_expressions(authors: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    [line] = re.findall(r"^python -m qafe (import .*)$", text, re.MULTILINE)
    places = {"smile.pth": str(authors), "frown.pth": str(authors), "AUTHORS": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in shlex.split(line)]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "frown.safetensors", "smile.safetensors"]


def test_training_goes_on_without_the_encoders_that_a_model_started_from(
    sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(tiny(), {"train.epochs": 1, "model.rgb.weights": str(tmp_path / "gone.safetensors")})
    start = tmp_path / "start"
    start.mkdir()
    weights.save(start / "smile.safetensors", build(config), config)
    (start / "config.json").write_text(to_json(config))
    line = ["train", "--data-root", str(sample_root), "--expression", "smile", "--init", str(start), *QUICK]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    assert from_json((tmp_path / "out" / "config.json").read_text()).model.rgb.weights == ""
    capsys.readouterr()
    assert main([*line, "--set", "model.rgb.weights=other.pth"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --init gives the encoders' weights too, got model.rgb.weights")


def test_what_a_folder_says_of_the_user_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", embedded(tmp_path))
    monkeypatch.setenv("LOGNAME", "marielouise")
    config = override(tiny(), {"model.rgb.weights": "/data/marielouise/marielouise_encoder.pth"})
    for expression in ("smile", "marielouise"):
        (tmp_path / expression).mkdir()
        weights.save(tmp_path / expression / (expression + ".safetensors"), build(config), config)
    assert registry.main(["register", "--weights", str(tmp_path / "smile")]) == 0
    client = MlflowClient(embedded(tmp_path))
    version = client.get_model_version("qafe-net", "1")
    run = client.get_run(version.run_id)
    [kept] = (tmp_path / "mlruns").rglob(f"{version.run_id}/artifacts/checkpoint/*.safetensors")
    assert "marielouise" not in json.dumps([run.data.tags, run.data.params, version.tags])
    assert b"marielouise" not in kept.read_bytes()
    assert run.data.params["train.epochs"] == str(config.train.epochs)
    assert "source_sha256" not in version.tags
    capsys.readouterr()
    assert registry.main(["register", "--weights", str(tmp_path / "marielouise")]) == 2
    assert "must not be called like the user" in capsys.readouterr().err
