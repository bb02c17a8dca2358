import json
import re

import pytest

from qafe.config import PRESETS, Config, paper, tiny
from qafe.dotted import flatten, from_json, override, parse_settings, to_json
from qafe.errors import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip_gives_an_equal_object(preset: str) -> None:
    config = PRESETS[preset]()
    assert config.preset == preset
    assert from_json(to_json(config)) == config
    assert override(Config(), flatten(config)) == config


def test_a_config_of_an_earlier_version_loads_without_what_decides_nothing() -> None:
    tree = json.loads(to_json(tiny()))
    tree["data"]["memory_mb"] = 2048
    assert from_json(json.dumps(tree)) == tiny()
    with pytest.raises(ConfigError, match="no setting named"):
        override(tiny(), {"data.memory_mb": 1})


def test_the_paper_preset_holds_the_published_settings() -> None:
    flat = flatten(paper())
    published = {
        "model.segments": 5,
        "model.segment_frames": 16,
        "model.rgb.size_px": 224,
        "model.heatmap.size_px": 56,
        "model.fusion.layers": 3,
        "model.fusion.heads": 8,
        "data.repeats": 5,
        "data.heatmap.canvas_px": 256,
        "train.lr": 1e-3,
        "train.batch_size": 4,
        "train.epochs": 100,
        "train.loss": "bmc",
    }
    assert {name: flat[name] for name in published} == published


def test_text_becomes_the_type_of_its_setting() -> None:
    config = override(
        tiny(),
        {
            "model.fusion.layers": "2",
            "train.lr": "1e-2",
            "data.augment.joint": "false",
            "model.heatmap.blocks": "[1,2,1]",
            "model.fusion.kind": "gated",
        },
    )
    assert config.model.fusion.layers == 2
    assert config.train.lr == 0.01
    assert config.data.augment.joint is False
    assert config.model.heatmap.blocks == (1, 2, 1)
    assert config.model.fusion.kind == "gated"
    assert override(tiny(), {"train.epochs": "1e2"}).train.epochs == 100


def test_settings_that_must_agree_change_together() -> None:
    config = override(tiny(), {"model.fusion.width": 96, "model.fusion.heads": 12})
    assert (config.model.fusion.width, config.model.fusion.heads) == (96, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.fusion.layer": 1}, "Did you mean model.fusion.layers"),
        ({"model.fusion.kind": "crss"}, "must be one of cross, cross_split"),
        ({"train.epochs": "1.5"}, "train.epochs must be a whole number, got '1.5'"),
        ({"train.lr": "fast"}, "train.lr must be a number"),
        ({"train.lr": "nan"}, "train.lr must be a number"),
        ({"train.lr": 0}, "train.lr must be greater than 0"),
        ({"train.epochs": True}, "must be a whole number"),
        ({"data.augment.joint": "perhaps"}, "must be true or false"),
        ({"model.heatmap.blocks": "4,x"}, "model.heatmap.blocks must be a whole number"),
        ({"model.fusion.width": 64, "model.fusion.heads": 7}, "must divide model.fusion.width=64, got 7"),
        ({"model.rgb.size_px": 30}, "multiple of 16"),
        ({"train.batch_size": 1, "train.loss": "bmc"}, "batch_size must be at least 2 for loss='bmc'"),
        ({"train.train_noise_sigma": True, "train.loss": "mse"}, "train.train_noise_sigma needs a loss"),
        ({"data.heatmap.blur_px": 4}, "must be 0 or odd"),
        ({"data.validation_fraction": 1.0}, "between 0 and 1"),
        ({"data.augment.crop": 0.2}, "data.augment.crop"),
        ({"train.momentum": 1.0}, r"train.momentum must lie in [0, 1), got 1"),
        ({"train.momentum": -0.1}, "train.momentum must lie in"),
        ({"train.step_factor": 0}, "train.step_factor must be greater than 0"),
        ({"model.head_widths": (16, 0)}, "model.head_widths"),
        (
            {"data.heatmap.canvas_px": 7, "data.heatmap.blur_px": 7},
            "must be greater than data.heatmap.blur_px=7, got 7",
        ),
        *(
            ({name: -1}, f"{name} must be at least 0, got -1")
            for name in (
                "model.rgb.spatial_depth",
                "model.rgb.temporal_depth",
                "data.split_seed",
                "data.cache_gb",
                "data.workers",
                "train.weight_decay",
                "train.warmup_epochs",
                "train.clip_norm",
                "train.seed",
            )
        ),
    ],
)
def test_a_bad_setting_is_refused_with_its_rule(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        override(tiny(), settings)


def test_settings_are_written_name_equals_value() -> None:
    assert parse_settings(["a.b=c=d", " x = 1 "]) == {"a.b": "c=d", "x": "1"}
    with pytest.raises(ConfigError, match="name=value"):
        parse_settings(["train.lr"])


@pytest.mark.parametrize("text", ["", "[1]", '{"model": {"no_such": 1}}', '{"train": {"lr": "x"}}'])
def test_a_config_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        from_json(text)
