import copy
import gc
import math
import multiprocessing
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qafe.config import Config, TrainConfig
from qafe.data.cohort import Cohort, choose_expressions, load_cohort
from qafe.data.dataset import ClipBatch, ClipDataset
from qafe.data.loader import clip_loader
from qafe.device import amp_dtype, pick_device
from qafe.dotted import override
from qafe.errors import CheckpointError, ConfigError, ManifestError, MediaError
from qafe.history import ExpressionHistory, read_history, write_history
from qafe.losses import LOSSES
from qafe.model import weights
from qafe.model.qafenet import build
from qafe.optim import lr_factor
from qafe.predict import predict
from qafe.score import SUFFIX, Scorer
from qafe.train import (
    BEST_FILE,
    STATE_FILE,
    EpochResult,
    Save,
    _Run,
    _seeded,
    epoch_batches,
    fit,
    step_sizes,
)


@pytest.fixture(scope="module")
def smile(sample_root: Path, quick: Config) -> Cohort:
    return load_cohort(sample_root, quick.data).only("smile")


def epochs(config: Config, cohort: Cohort, **more: Any) -> Iterator[EpochResult]:
    return fit(config, cohort.store, cohort.train, cohort.validation, device=torch.device("cpu"), **more)


def train(config: Config, cohort: Cohort, resume_from: Path | None = None) -> list[EpochResult]:
    return list(epochs(config, cohort, resume_from=resume_from))


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
        {"train.accumulate": 2, "model.fusion.dropout": 0.2, "train.checkpoint": True},
        {"model.fusion.dropout": 0.2, "data.workers": 1},
    ],
    ids=["adamw-cosine-dropout", "sgd-step-sigma", "accumulate", "workers"],
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


class Asked(Exception):
    """Somebody wants the machine back."""


@pytest.mark.parametrize(
    "settings",
    [
        {"model.fusion.dropout": 0.2, "model.fusion.drop_path": 0.1},
        {"train.batch_size": 2, "train.accumulate": 2, "model.fusion.dropout": 0.2, "train.schedule": "step"},
        {"model.fusion.dropout": 0.2, "data.workers": 1, "train.train_noise_sigma": True, "train.loss": "bmc"},
    ],
    ids=["dropout", "accumulate", "workers"],
)
def test_a_run_that_is_interrupted_before_any_step_goes_on_with_the_same_numbers(
    quick: Config, smile: Cohort, tmp_path: Path, settings: dict[str, object]
) -> None:
    config = override(quick, settings)
    moments: list[int] = []

    def note(save: Save) -> None:
        save(tmp_path / str(len(moments)))
        moments.append(len(moments))

    def leave(save: Save) -> None:
        save(tmp_path / "left")
        raise Asked

    whole = list(epochs(config, smile, between_steps=note))
    steps = len(moments) // config.train.epochs
    assert steps > 2
    for moment in moments:
        with pytest.raises(Asked):
            next(epochs(config, smile, resume_from=tmp_path / str(moment), between_steps=leave))
        torch.rand(7)
        rest = train(config, smile, tmp_path / "left")
        assert [r.epoch for r in rest] == [r.epoch for r in whole[moment // steps :]]
        for ours, theirs in zip(rest, whole[moment // steps :], strict=True):
            assert (ours.train_loss, ours.lr, ours.metrics) == (theirs.train_loss, theirs.lr, theirs.metrics)
            assert (ours.best_epoch, ours.best_spearman) == (theirs.best_epoch, theirs.best_spearman)


def test_a_loader_that_breaks_asks_once_more(
    quick: Config, smile: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(quick, smile)
    told: list[int] = []

    def between(save: Save) -> None:
        told.append(1)
        save(tmp_path)

    def breaking(loader: Any) -> Iterator[ClipBatch]:
        for number, batch in enumerate(loader):
            if number == 1:
                raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr("qafe.train.read_batches", breaking)
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            next(epochs(quick, smile, between_steps=between))
    assert len(told) == 3, "before two steps, and when the second had nothing to read"
    assert [r.train_loss for r in train(quick, smile, resume_from=tmp_path)] == [r.train_loss for r in whole]


def test_a_training_that_has_ended_keeps_no_model(quick: Config, smile: Cohort, tmp_path: Path) -> None:
    made: list[weakref.ref[nn.Module]] = []

    def run(resume_from: Path | None) -> None:
        saves: list[Save] = []
        more = {"resume_from": resume_from, "heard": 0, "between_steps": lambda save: saves.clear()}
        for result in epochs(quick, smile, **more):
            made.append(weakref.ref(result.save.__self__.model))  # type: ignore[attr-defined]
            result.save(tmp_path)

    run(None)  # what torch imports in the first training holds its frames
    made.clear()
    gc.collect()
    gc.disable()
    try:
        run(None)
        run(tmp_path)
        assert made
        assert not [ref for ref in made if ref() is not None]
    finally:
        gc.enable()


def test_a_result_that_was_not_heard_is_given_again(quick: Config, smile: Cohort, tmp_path: Path) -> None:
    first = epochs(quick, smile)
    known = next(first)
    known.save(tmp_path)
    rest = list(first)
    assert [r.epoch for r in epochs(quick, smile, heard=1, resume_from=tmp_path)] == [2, 3]
    again = list(epochs(quick, smile, heard=0, resume_from=tmp_path))
    assert [(r.epoch, r.train_loss) for r in again] == [(r.epoch, r.train_loss) for r in [known, *rest]]
    assert again[0].metrics == known.metrics
    np.testing.assert_array_equal(again[0].predictions, known.predictions)
    assert again[0].attention.keys() == known.attention.keys()
    for name, read in known.attention.items():
        np.testing.assert_array_equal(again[0].attention[name], read)


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (None, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_run_resumes_in_its_own_precision(
    quick: Config,
    smile: Cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: torch.dtype | None,
    after: torch.dtype,
) -> None:
    def fitted(dtype: torch.dtype | None, settings: dict[str, object], resume_from: Path | None) -> EpochResult:
        monkeypatch.setattr("qafe.train.amp_dtype", lambda *_: dtype)
        config, device = override(quick, {"train.precision": "auto"} | settings), torch.device("cpu")
        return next(fit(config, smile.store, smile.train, smile.validation, device=device, resume_from=resume_from))

    fitted(before, {}, None).save(tmp_path)
    if before == after:
        assert fitted(after, {"train.precision": "bf16"}, tmp_path).epoch == 2, "auto was bf16 before"
        return
    names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    with pytest.raises(CheckpointError) as caught:
        fitted(after, {}, tmp_path)
    assert f"last.pt has {names[before]}, and here train.precision=auto is {names[after]} (on cpu)" in str(caught.value)
    assert f"Set train.precision={names[before]}," in str(caught.value)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_state_of_an_earlier_version_does_not_know_its_precision(
    quick: Config, smile: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    dtype = torch.float16 if scaled else None
    config, device = override(quick, {"train.precision": "auto"}), torch.device("cpu")
    monkeypatch.setattr("qafe.train.amp_dtype", lambda *_: dtype)
    next(fit(config, smile.store, smile.train, smile.validation, device=device)).save(tmp_path)
    state = torch.load(tmp_path / STATE_FILE)
    assert bool(state["scaler"]) == scaled
    del state["precision"]
    torch.save(state, tmp_path / STATE_FILE)
    monkeypatch.setattr("qafe.train.amp_dtype", lambda *_: torch.float16)
    resumed = next(fit(config, smile.store, smile.train, smile.validation, device=device, resume_from=tmp_path))
    assert resumed.epoch == 2
    assert math.isfinite(resumed.train_loss)
    with pytest.raises(CheckpointError, match=r"train\.precision=auto"):
        train(override(quick, {"train.precision": "bf16"}), smile, resume_from=tmp_path)


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
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    # Xeons of 2017, of 2020 and of 2023.
    for known, dtype in (({}, None), ({"avx512_bf16": True}, None), ({"avx512_bf16": True, "amx_bf16": True}, bf16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert amp_dtype(TrainConfig(), cpu) == dtype
        assert amp_dtype(TrainConfig(precision="fp32"), cpu) is None
    assert amp_dtype(TrainConfig(precision="bf16"), cpu) == bf16
    # A machine with an A100 and a V100, which only emulates bf16; the A100 is the current one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    major = {None: 8, 0: 8, 1: 7}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major[torch.device(device).index], 0))
    for name, dtype in (("cuda", bf16), ("cuda:0", bf16), ("cuda:1", torch.float16)):
        assert amp_dtype(TrainConfig(), torch.device(name)) == dtype
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert amp_dtype(TrainConfig(), torch.device("cuda:1")) == bf16
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


@pytest.mark.slow
def test_the_loss_of_bf16_stays_within_the_noise_of_seeds_over_50_steps(quick: Config, smile: Cohort) -> None:
    steps = {"train.epochs": 50, "train.batch_size": 16, "train.loss": "mse"}  # an epoch is a step

    def curve(seed: int, precision: str) -> np.ndarray:
        config = override(quick, steps | {"train.seed": seed, "train.precision": precision})
        return np.array([result.train_loss for result in train(config, smile)])

    full, others = curve(0, "fp32"), [curve(seed, "fp32") for seed in (1, 2, 3)]
    noise = np.mean([np.sqrt(np.mean((other - full) ** 2)) for other in others])
    assert 0 < np.sqrt(np.mean((curve(0, "bf16") - full) ** 2)) < noise


@pytest.mark.gpu
def test_training_on_a_gpu_resumes(quick: Config, smile: Cohort, tmp_path: Path) -> None:
    device = pick_device("cuda")
    config, results = override(quick, {"train.precision": "auto"}), []
    for result in fit(config, smile.store, smile.train, smile.validation, device=device):
        results.append(result)
        result.save(tmp_path / str(result.epoch))
    rest = list(fit(config, smile.store, smile.train, smile.validation, device=device, resume_from=tmp_path / "1"))
    assert rest[-1].train_loss == pytest.approx(results[-1].train_loss, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_scores_on_a_cpu_are_those_that_training_on_a_gpu_reported(
    quick: Config, smile: Cohort, tmp_path: Path, workers: int
) -> None:
    config = override(quick, {"data.workers": workers, "train.precision": "auto"})
    results = list(fit(config, smile.store, smile.train, smile.validation, device=pick_device("cuda")))
    assert torch.backends.cudnn.allow_tf32, "training itself may use it"
    results[-1].save(tmp_path)
    (tmp_path / BEST_FILE).rename(tmp_path / f"smile{SUFFIX}")
    reported = results[results[-1].best_epoch - 1].predictions
    scores = Scorer(tmp_path, torch.device("cpu")).score_samples(smile.store, smile.validation)
    np.testing.assert_allclose(scores, reported, atol=1e-5)


def test_the_best_epochs_attention_is_kept(quick: Config, smile: Cohort) -> None:
    results = train(quick, smile)
    history = ExpressionHistory.start(smile.validation)
    for result in results:
        history.add(result)
    best = results[history.best_epoch - 1].attention
    assert list(history.attention) == list(best) == ["layer 1: rgb reads heatmap", "layer 1: heatmap reads rgb"]
    for name, rows in history.attention.items():
        assert rows == best[name].tolist()
        assert best[name].shape == (2, 2)
        np.testing.assert_allclose(best[name].sum(axis=1), 1, rtol=1e-5)
    assert any((result.attention[name] != best[name]).any() for result in results for name in best)
    (result,) = train(override(quick, {"model.fusion.kind": "sum", "train.epochs": 1}), smile)
    assert result.attention == {}


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


def toy(clips: int, batch_size: int, quick: Config, smile: Cohort, **settings: object) -> _Run:
    """A run over some clips, about to train its first epoch."""
    names = {"train.batch_size": batch_size, "data.augment.flip": 0.0, "data.augment.crop": 1.0}
    config = override(quick, names | {name.replace("__", "."): value for name, value in settings.items()})
    return _Run(config, smile.store, smile.train[:clips], smile.validation, torch.device("cpu"))


def gradients_of_an_epoch(run: _Run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, torch.Tensor]], float]:
    """What each step of one epoch would have applied, without applying it; and the epoch's loss."""
    steps: list[dict[str, torch.Tensor]] = []

    def note() -> None:
        both = {**dict(run.model.named_parameters()), **dict(run.loss.named_parameters())}
        steps.append({name: p.grad.clone() for name, p in both.items() if p.grad is not None})
        run.optimizer.zero_grad()

    monkeypatch.setattr(run, "_step", note)
    monkeypatch.setattr(run.schedule, "step", lambda: None)
    run.model.train()
    for norm in run.model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            monkeypatch.setattr(norm, "train", lambda mode=True, norm=norm: norm)
            norm.training = False
    torch.manual_seed(3)
    batches = epoch_batches(len(run.train_set), run.config.train.batch_size)
    loss = run._train_epoch(clip_loader(run.train_set, batches, run.config, run.device), batches)
    return steps, loss


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("clips", [8, 7, 5], ids="of {}".format)
def test_accumulated_batches_give_the_gradient_of_one_batch(
    quick: Config, smile: Cohort, monkeypatch: pytest.MonkeyPatch, loss: str, clips: int
) -> None:
    extra = {"train__loss": loss, "train__train_noise_sigma": loss in ("bmc", "gai")}
    one, one_loss = gradients_of_an_epoch(toy(clips, 8, quick, smile, **extra), monkeypatch)
    parts, parts_loss = gradients_of_an_epoch(toy(clips, 2, quick, smile, train__accumulate=4, **extra), monkeypatch)
    assert len(one) == len(parts) == 1
    assert one[0].keys() == parts[0].keys()
    assert ("sigma" in one[0]) == (loss in ("bmc", "gai"))
    assert parts_loss == pytest.approx(one_loss, rel=1e-5)
    whole = torch.cat([gradient.flatten() for gradient in one[0].values()])
    for name, gradient in one[0].items():
        assert (parts[0][name] - gradient).abs().max() < 1e-5 * whole.abs().max(), name


def test_bmc_takes_batches_of_one_when_a_step_has_several(quick: Config, smile: Cohort) -> None:
    config = override(quick, {"train.batch_size": 1, "train.accumulate": 4, "train.loss": "bmc", "train.epochs": 1})
    assert math.isfinite(train(config, smile)[0].train_loss)


def test_both_passes_draw_the_same_dropout_and_statistics_count_once(
    quick: Config, smile: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy(8, 4, quick, smile, train__accumulate=2, model__fusion__dropout=0.5, model__fusion__drop_path=0.3)
    seen: list[torch.Tensor] = []
    predict_batch = run._predict

    def spy(batch: ClipBatch) -> tuple[torch.Tensor, torch.Tensor]:
        found = predict_batch(batch)
        seen.append(found[0].detach())
        return found

    monkeypatch.setattr(run, "_predict", spy)
    with _seeded(0, 1, run.device):
        batches = epoch_batches(len(run.train_set), 4)
        run._train_epoch(clip_loader(run.train_set, batches, run.config, run.device), batches)
        drawn = torch.rand(1)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    counts = {int(value) for name, value in run.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}
    twin = toy(8, 4, quick, smile, train__loss="mse", model__fusion__dropout=0.5, model__fusion__drop_path=0.3)
    with _seeded(0, 1, run.device):
        batches = epoch_batches(len(run.train_set), 4)
        monkeypatch.setattr(twin, "_step", lambda: None)
        monkeypatch.setattr(twin.schedule, "step", lambda: None)
        twin._train_epoch(clip_loader(twin.train_set, batches, twin.config, twin.device), batches)
        assert torch.equal(drawn, torch.rand(1)), "the second pass leaves the generator where the first did"
    ours, theirs = dict(run.model.named_buffers()), dict(twin.model.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "statistics of one pass over the same clips"


@pytest.mark.parametrize(("sizes", "steps"), [([4, 4, 4], [2, 1]), ([1] * 5, [2, 3]), ([2], [1]), ([1], [1])])
def test_steps_by_hand(sizes: list[int], steps: list[int]) -> None:
    assert step_sizes(sizes, 2) == steps


@pytest.mark.parametrize("encoder", ["rgb", "heatmap"])
def test_a_frozen_encoder_stays_as_it_is(quick: Config, smile: Cohort, tmp_path: Path, encoder: str) -> None:
    config = override(quick, {f"model.{encoder}.frozen": True, "train.epochs": 2})
    run = _Run(config, smile.store, smile.train, smile.validation, torch.device("cpu"))
    parts = ("spatial.", "temporal.") if encoder == "rgb" else ("heatmap.",)
    before = copy.deepcopy(run.model.state_dict())
    results = list(run.epochs())
    assert {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])} == {
        name for name in before if not name.startswith((*parts, "fusion.unused_norm"))
    }
    named = dict(run.model.named_parameters())
    inside = [p for name, p in named.items() if name.startswith(parts)]
    assert inside
    assert not any(p in run.optimizer.state or p.grad is not None for p in inside)
    run.model.train()
    assert not any(m.training for name, m in run.model.named_modules() if f"{name}.".startswith(parts))
    side, frames = getattr(config.model, encoder).size_px, config.model.clip_frames
    channels = 3 if encoder == "rgb" else config.data.heatmap.channels
    tokens = getattr(run.model, f"encode_{encoder}")(torch.rand(1, channels, frames, side, side))
    assert tokens.grad_fn is None
    results[0].save(tmp_path)
    assert train(config, smile, resume_from=tmp_path) == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_checkpointing_changes_memory_alone(quick: Config, smile: Cohort, accumulate: int) -> None:
    config = override(quick, {"train.accumulate": accumulate})
    plain, again = train(config, smile), train(override(config, {"train.checkpoint": True}), smile)
    assert [result.train_loss for result in plain] == [result.train_loss for result in again]
    np.testing.assert_array_equal(plain[-1].predictions, again[-1].predictions)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{"train.precision": "bf16"}, {"train.precision": "fp16"}, {"train.compile": True}, {"train.checkpoint": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_gpu_trains_fast_and_stays_near(quick: Config, smile: Cohort, settings: dict[str, object]) -> None:
    device = pick_device("cuda")
    losses = []
    for extra in ({"train.precision": "fp32"}, {"train.precision": "fp32", **settings}):
        config = override(quick, {"train.accumulate": 2, **extra})
        run = fit(config, smile.store, smile.train, smile.validation, device=device)
        losses.append([result.train_loss for result in run])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
