import shutil
from pathlib import Path

import torch

from qafe import dotted
from qafe.config import Config
from qafe.dotted import override
from qafe.model import weights
from tracking.figures import trial_files
from tracking.privacy import without_paths

from .test_runs import checkpoint  # noqa: F401 (a fixture)

SECRET = "/data/clinic-7/anna"


def with_paths(config: Config) -> Config:
    return override(
        config,
        {"model.rgb.weights": f"{SECRET}/face.pth", "model.heatmap.weights": f"{SECRET}/pose.pth"},
    )


def test_only_the_names_of_pretrained_files_leave(quick: Config) -> None:
    config = without_paths(with_paths(quick))
    assert config == override(quick, {"model.rgb.weights": "face.pth", "model.heatmap.weights": "pose.pth"})
    assert without_paths(quick) == quick


def test_no_path_is_in_a_trials_files(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    own = tmp_path / "own"
    shutil.copytree(checkpoint, own)
    config = with_paths(dotted.from_json((own / "config.json").read_text()))
    (own / "config.json").write_text(dotted.to_json(config))
    model, _, extra = weights.load(own / "smile" / "best.safetensors")
    weights.save(own / "smile" / "best.safetensors", model, config, extra)
    with trial_files(own, b"key") as folder:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) >= 5
        assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
        assert dotted.from_json((folder / "config.json").read_text()) == without_paths(config)
        sent, sent_config, sent_extra = weights.load(folder / "checkpoint" / "smile.safetensors")
    assert sent_config == without_paths(config)
    assert sent_extra == extra != {}
    for name, value in model.state_dict().items():
        assert torch.equal(sent.state_dict()[name], value), name
