import math
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qafe.config import Config, TrainConfig, override
from qafe.data.cohort import Cohort, choose_expressions, load_cohort
from qafe.data.dataset import ClipDataset
from qafe.errors import CheckpointError, ConfigError, ManifestError, MediaError
from qafe.history import ExpressionHistory, read_history, write_history
from qafe.model import weights
from qafe.model.qafenet import build
from qafe.score import SUFFIX, Scorer
from qafe.train import (
    BEST_FILE,
    STATE_FILE,
    EpochResult,
    amp_dtype,
    epoch_batches,
    fit,
    lr_factor,
    pick_device,
    predict,
)


@pytest.fixture(scope="module")
def smile(sample_root: Path, quick: Config) -> Cohort:
    return load_cohort(sample_root, quick.data).only("smile")


def train(config: Config, cohort: Cohort, resume_from: Path | None = None) -> list[EpochResult]:
    device = torch.device("cpu")
    runs = fit(config, cohort.store, cohort.train, cohort.validation, device=device, resume_from=resume_from)
    return list(runs)


def test_training_gives_a_result_for_each_epoch(quick: Config, smile: Cohort) -> None:
    results = train(quick, smile)
    assert [result.epoch for result in results] == [1, 2, 3]
    for result in results:
        assert math.isfinite(result.train_loss)
        assert result.predictions.shape == (len(smile.validation),)
        assert result.best_spearman == max(r.metrics["spearman"] for r in results[: result.epoch])
        assert results[result.best_epoch - 1].metrics["spearman"] == result.best_spearman
    assert results[0].lr == quick.train.lr
    assert results[-1].lr < quick.train.lr


def test_a_model_can_learn_its_training_clips(quick: Config, smile: Cohort) -> None:
    config = override(
        quick, {"train.epochs": 25, "train.loss": "mse", "data.augment.crop": 1.0, "data.augment.flip": 0}
    )
    losses = [result.train_loss for result in train(config, smile)]
    assert min(losses[-5:]) < 0.4 * losses[0]


def test_seeds_decide_everything(quick: Config, smile: Cohort) -> None:
    first, again = train(quick, smile), train(quick, smile)
    other = train(override(quick, {"train.seed": 1}), smile)
    assert [r.train_loss for r in first] == [r.train_loss for r in again]
    np.testing.assert_array_equal(first[-1].predictions, again[-1].predictions)
    assert first[-1].train_loss != other[-1].train_loss


@pytest.mark.parametrize(
    "settings",
    [
        {"model.fusion.dropout": 0.2, "model.fusion.drop_path": 0.1},
        {
            "train.optimizer": "sgd",
            "train.schedule": "step",
            "train.step_epochs": 2,
            "train.loss": "bmc",
            "train.train_noise_sigma": True,
        },
        {"model.fusion.dropout": 0.2, "data.workers": 1},
    ],
    ids=["adamw-cosine-dropout", "sgd-step-sigma", "workers"],
)
def test_a_resumed_run_gives_the_numbers_of_one_that_never_stopped(
    quick: Config, smile: Cohort, tmp_path: Path, settings: dict[str, object]
) -> None:
    config = override(quick, settings)
    whole = []
    for result in fit(config, smile.store, smile.train, smile.validation, device=torch.device("cpu")):
        whole.append(result)
        result.save(tmp_path / str(result.epoch))
    torch.rand(7)  # what happens to the global generator meanwhile must not matter
    rest = train(config, smile, resume_from=tmp_path / "1")
    assert [r.epoch for r in rest] == [2, 3]
    assert [r.train_loss for r in rest] == [r.train_loss for r in whole[1:]]
    np.testing.assert_array_equal(rest[-1].predictions, whole[-1].predictions)
    rest[-1].save(tmp_path / "resumed")
    ours, _, _ = weights.load(tmp_path / "resumed" / BEST_FILE)
    theirs, _, _ = weights.load(tmp_path / "3" / BEST_FILE)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert rest[-1].best_epoch == whole[-1].best_epoch


def test_workers_change_nothing_and_live_as_long_as_the_run(quick: Config, smile: Cohort) -> None:
    expected = train(override(quick, {"model.fusion.dropout": 0.2}), smile)
    config = override(quick, {"model.fusion.dropout": 0.2, "data.workers": 2})
    run = fit(config, smile.store, smile.train, smile.validation, device=torch.device("cpu"))
    results = [next(run)]
    workers = multiprocessing.active_children()
    assert len(workers) == 4, "two that read for training and two for validation"
    results.append(next(run))
    assert {worker.pid for worker in multiprocessing.active_children()} == {worker.pid for worker in workers}
    del run  # The results are kept: they must not keep the workers.
    assert multiprocessing.active_children() == []
    assert [result.train_loss for result in results] == [result.train_loss for result in expected[:2]]
    np.testing.assert_array_equal(results[1].predictions, expected[1].predictions)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_frame_is_said_in_its_own_words(
    quick: Config, sample_root: Path, tmp_path: Path, workers: int
) -> None:
    shutil.copytree(sample_root, tmp_path / "copy")
    smile = load_cohort(tmp_path / "copy", quick.data).only("smile")
    frame = smile.store.frame_paths(smile.train[3].patient, smile.train[3].video)[0]
    frame.write_bytes(frame.read_bytes()[:-100])
    with pytest.raises(MediaError) as caught:
        train(override(quick, {"data.workers": workers}), smile)
    rule = f"a frame must be a whole JPEG, and {frame} is damaged or truncated. Run python -m qafe prepare again."
    assert str(caught.value) == rule


def test_a_run_resumes_only_what_it_was(quick: Config, smile: Cohort, tmp_path: Path) -> None:
    next(fit(quick, smile.store, smile.train, smile.validation)).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"train\.lr=0\.002"):
        train(override(quick, {"train.lr": 0.5}), smile, resume_from=tmp_path)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        train(quick, smile, resume_from=tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(quick, smile, resume_from=tmp_path / "nowhere")


def test_a_loss_that_explodes_is_said_at_once(quick: Config, smile: Cohort) -> None:
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(override(quick, {"train.loss": "mse", "train.lr": 1e30, "train.optimizer": "sgd"}), smile)


def test_too_few_clips_are_refused_before_any_work(quick: Config, smile: Cohort) -> None:
    with pytest.raises(ManifestError, match="at least 2 training and 3 validation"):
        fit(quick, smile.store, smile.train, smile.validation[:2])


def test_accumulation_takes_a_step_for_each_group_of_batches(
    quick: Config, smile: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: steps.append(1))
    config = override(quick, {"train.accumulate": 2, "train.epochs": 1})
    train(config, smile)
    assert len(smile.train) == 12  # 3 batches of 4: one group of two, one of one
    assert len(steps) == 2


def test_a_last_batch_of_one_joins_the_batch_before() -> None:
    batches = epoch_batches(9, 4)
    assert [len(batch) for batch in batches] == [4, 5]
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    assert [len(batch) for batch in epoch_batches(10, 4)] == [4, 4, 2]
    assert [len(batch) for batch in epoch_batches(3, 1)] == [1, 1, 1]


def test_learning_rates_by_hand() -> None:
    step = lr_factor(TrainConfig(step_epochs=40, step_factor=0.1))
    assert [step(epoch) for epoch in (0, 39, 40, 80)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = lr_factor(TrainConfig(schedule="cosine", epochs=12, warmup_epochs=2))
    assert [cosine(epoch) for epoch in (0, 1, 2, 7, 12)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])
    assert lr_factor(TrainConfig(schedule="constant"))(77) == 1


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert amp_dtype(TrainConfig(), cpu) is None
    assert amp_dtype(TrainConfig(precision="bf16"), cpu) == torch.bfloat16
    # A GPU that only emulates bf16, as torch answers for it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert amp_dtype(TrainConfig(), torch.device("cuda")) == torch.float16
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        amp_dtype(TrainConfig(precision="fp16"), cpu)
    with pytest.raises(ConfigError, match="device"):
        pick_device("abacus")


def test_evaluation_does_without_tf32(quick: Config, smile: Cohort) -> None:
    model, seen = build(quick), []
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    clips = ClipDataset(smile.store, smile.validation, quick, train=False)
    predict(model, clips, quick, torch.device("cpu"))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


def test_bf16_trains(quick: Config, smile: Cohort) -> None:
    results = train(override(quick, {"train.precision": "bf16", "train.epochs": 1}), smile)
    assert math.isfinite(results[0].train_loss)


@pytest.mark.gpu
def test_training_on_a_gpu_resumes(quick: Config, smile: Cohort, tmp_path: Path) -> None:
    device = pick_device("cuda")
    results = []
    for result in fit(quick, smile.store, smile.train, smile.validation, device=device):
        results.append(result)
        result.save(tmp_path / str(result.epoch))
    rest = list(fit(quick, smile.store, smile.train, smile.validation, device=device, resume_from=tmp_path / "1"))
    assert rest[-1].train_loss == pytest.approx(results[-1].train_loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_scores_on_a_cpu_are_those_that_training_on_a_gpu_reported(
    quick: Config, smile: Cohort, tmp_path: Path, workers: int
) -> None:
    config = override(quick, {"data.workers": workers})
    results = list(fit(config, smile.store, smile.train, smile.validation, device=pick_device("cuda")))
    assert torch.backends.cudnn.allow_tf32, "training itself may use it"
    results[-1].save(tmp_path)
    (tmp_path / BEST_FILE).rename(tmp_path / f"smile{SUFFIX}")
    reported = results[results[-1].best_epoch - 1].predictions
    scores = Scorer(tmp_path, torch.device("cpu")).score_samples(smile.store, smile.validation)
    np.testing.assert_allclose(scores, reported, atol=1e-5)


def test_histories_survive_the_disk(quick: Config, smile: Cohort, tmp_path: Path) -> None:
    entry = ExpressionHistory.start(smile.validation)
    for result in train(quick, smile):
        entry.add(result)
    write_history(tmp_path, {"smile": entry})
    assert read_history(tmp_path) == {"smile": entry}
    assert entry.prediction_matrix().shape == (3, len(smile.validation))
    assert entry.best.epoch == entry.best_epoch
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"history\.json"):
        read_history(tmp_path)


def test_cohorts_keep_patients_apart(sample_root: Path, quick: Config) -> None:
    cohort = load_cohort(sample_root, quick.data)
    sides = [{sample.patient for sample in part} for part in (cohort.train, cohort.validation, cohort.test)]
    assert [len(side) for side in sides] == [6, 2, 3]
    assert len(set.union(*sides)) == 6 + 2 + 3
    shuffled = load_cohort(sample_root, override(quick, {"data.shuffle_labels": True}).data)
    assert [s.id for s in shuffled.train] == [s.id for s in cohort.train]
    assert [s.score for s in shuffled.train] != [s.score for s in cohort.train]
    assert sorted(s.score for s in shuffled.only("smile").train) == sorted(s.score for s in cohort.only("smile").train)


def test_expressions_are_chosen_by_name(sample_root: Path, quick: Config) -> None:
    manifest = load_cohort(sample_root, quick.data).manifest
    assert choose_expressions(manifest, "all") == ("sit_at_rest", "smile", "frown", "squeeze_eyes", "clench_teeth")
    assert choose_expressions(manifest, "frown, smile,frown") == ("frown", "smile")
    with pytest.raises(ManifestError, match="got 'grin'"):
        choose_expressions(manifest, "grin")
