"""Training in two processes, as torchrun starts them: the numbers, files and messages of one process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qafe.__main__ import main
from qafe.config import Config
from qafe.data.cohort import load_cohort
from qafe.distributed import Ranks, Shares
from qafe.dotted import override
from qafe.history import read_history
from qafe.model import weights
from qafe.model.batchnorm import synchronise
from qafe.model.fusion import FUSIONS
from qafe.model.qafenet import build
from qafe.train import BEST_FILE

from .conftest import QUICK_FLAGS
from .distributed_worker import CASES, QUICK_CASES, config_of, epochs, noted

ROOT = Path(__file__).parents[1]
UNLIKE_ONE = ("own-statistics", "dropout")


def torchrun(*arguments: str, processes: int = 2) -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    launch = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, "-m", *launch, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(run: "subprocess.Popen[str]", timeout_s: float = 180) -> tuple[int, str, str]:
    try:
        out, err = run.communicate(timeout=timeout_s)
    finally:
        run.kill()
    return run.returncode, out, err


Got = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def one(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process got, by case, and the checkpoints of case bmc."""
    folder = tmp_path_factory.mktemp("distributed")
    whole = {case: noted(epochs(case, sample_root), folder / "one" / case) for case in QUICK_CASES}
    torch.save(whole, folder / "one.pt")
    (folder / "one" / "bmc" / "1").rename(folder / "one" / "1")
    return folder


@pytest.fixture(scope="module")
def got(one: Path, sample_root: Path) -> Got:
    """What one process got, and what each of two got: "one", "0" and "1"."""
    status, _, err = ended(torchrun("tests.distributed_worker", str(sample_root), str(one), *QUICK_CASES))
    assert status == 0, err
    assert "Warning" not in err
    return {name: torch.load(one / f"{name}.pt") for name in ("one", "0", "1")}


def assert_near(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=tolerance)
    for a, b in zip(ours["predictions"], theirs["predictions"], strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)
    for part in ("model", "loss"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            torch.testing.assert_close(value, theirs[part][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", [case for case in QUICK_CASES if case not in UNLIKE_ONE])
def test_two_processes_compute_what_one_does(got: Got, case: str) -> None:
    assert_near(got["0"][case], got["one"][case])


@pytest.mark.parametrize("case", [*QUICK_CASES, "resumed"])
def test_all_processes_know_the_same(got: Got, case: str) -> None:
    assert_same(got["0"][case], got["1"][case])


@pytest.mark.slow
def test_all_settings_in_two_processes(got: Got, one: Path, sample_root: Path) -> None:
    cases = [case for case in CASES if case not in QUICK_CASES]
    assert cases
    status, _, err = ended(torchrun("tests.distributed_worker", str(sample_root), str(one), *cases))
    assert status == 0, err
    first, second = (torch.load(one / f"{rank}.pt") for rank in (0, 1))
    for case in cases:
        assert_same(first[case], second[case])
        alone = noted(epochs(case, sample_root), one / "alone" / case)
        if case in UNLIKE_ONE:
            assert first[case]["losses"] != pytest.approx(alone["losses"], rel=1e-4)
        else:
            assert_near(first[case], alone, 1e-2 if case == "bf16" else 1e-4)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["losses"] == second["losses"]
    assert first["best_epoch"] == second["best_epoch"]
    for a, b in zip(first["predictions"], second["predictions"], strict=True):
        assert torch.equal(a, b)
    for part in ("model", "loss"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name


def test_statistics_of_their_own_give_other_numbers(got: Got) -> None:
    ours, theirs = (got[name]["own-statistics"]["losses"] for name in ("0", "one"))
    assert np.isfinite(ours).all()
    assert ours != pytest.approx(theirs, rel=1e-4)


def test_a_run_resumes_in_another_number_of_processes(got: Got, one: Path, sample_root: Path) -> None:
    for resumed in (got["0"]["resumed"], noted(epochs("bmc", sample_root, one / "bmc" / "1"), one / "again")):
        whole = got["one"]["bmc"]
        assert_near(resumed, {**whole, **{name: whole[name][1:] for name in ("losses", "predictions")}})


def test_the_weights_on_disk_are_those_of_one_process(got: Got, one: Path) -> None:
    ours, our_config, _ = weights.load(one / "bmc" / "2" / BEST_FILE)
    theirs, their_config, _ = weights.load(one / "one" / "bmc" / "2" / BEST_FILE)
    assert our_config == their_config
    assert not any(type(module).__name__ == "SyncBatchNorm" for module in ours.modules())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_shares_are_whole_and_even() -> None:
    for world in (1, 2, 3, 5):
        for length in range(8):
            shares = [list(range(length))[Ranks(rank, world).share(length)] for rank in range(world)]
            assert [index for share in shares for index in share] == list(range(length))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert shares[0] or not length
    assert list(Shares([[3, 1, 2], [0]], Ranks(1, 2))) == [[2], [0]]


def test_synchronised_norms_have_the_names_and_tensors_of_others(quick: Config) -> None:
    model = build(quick)
    before = model.state_dict(keep_vars=True)
    synchronise(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert any(type(module).__name__ == "SyncBatchNorm" for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) for module in model.modules())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_trained_parameter_has_a_gradient(quick: Config, fusion: str) -> None:
    model = build(override(quick, {"model.fusion.kind": fusion}))
    rgb, side = quick.model.rgb.size_px, quick.model.heatmap.size_px
    frames, channels = quick.model.clip_frames, quick.data.heatmap.channels
    model(torch.rand(2, 3, frames, rgb, rgb), torch.rand(2, channels, frames, side, side)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def flags(sample_root: Path, out: Path) -> list[str]:
    names = ["--preset", "tiny", "--device", "cpu", "--expression", "smile", *QUICK_FLAGS]
    return ["train", "--data-root", str(sample_root), *names, "--set", "train.optimizer=sgd", "--out", str(out)]


def test_the_command_writes_and_prints_once(
    sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", "train.epochs=1", "--set", "train.loss=mse", "--set", "train.batch_size=5"]
    run = torchrun("qafe", *flags(sample_root, tmp_path / "two"), *settings)
    assert main([*flags(sample_root, tmp_path / "one"), *settings]) == 0
    printed = capsys.readouterr()
    status, out, err = ended(run)
    assert status == 0, err
    assert out == printed.out
    assert [line.split(", MAE")[0] for line in err.splitlines() if line.startswith("smile")] == [
        line.split(", MAE")[0] for line in printed.err.splitlines()
    ]
    assert "Warning" not in err
    files = ["config.json", "history.json", "smile.safetensors"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == files
    assert (tmp_path / "two" / "config.json").read_text() == (tmp_path / "one" / "config.json").read_text()
    ours, theirs = (read_history(tmp_path / name)["smile"] for name in ("two", "one"))
    assert ours.ids == theirs.ids
    np.testing.assert_allclose(ours.best.predictions, theirs.best.predictions, atol=1e-3)
    mine, yours = (weights.load(tmp_path / name / "smile.safetensors")[0].state_dict() for name in ("two", "one"))
    for name, value in yours.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-3, msg=name)


def assert_one_error(status: int, out: str, err: str, *words: str) -> None:
    """One line of ours; status 2 of the process that failed first, which torchrun reports with a 1 of its own."""
    assert status == 1
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert all(word in errors[0] for word in words)
    assert err.partition("first observed failure")[2].count("exitcode  : 2 ") == 1, err
    assert "Traceback" not in err.partition("torch/distributed/elastic")[0], err


def test_an_error_in_one_process_ends_all_with_one_message(sample_root: Path, tmp_path: Path) -> None:
    # A frame that only the second process reads: half of the validation clips is its share.
    broken = tmp_path / "copy"
    shutil.copytree(sample_root, broken)
    smile = load_cohort(broken, config_of("bmc").data).only("smile")
    for frame in smile.store.frame_paths(smile.validation[-1].patient, smile.validation[-1].video):
        frame.write_bytes(frame.read_bytes()[:-100])
    assert_one_error(*ended(torchrun("qafe", *flags(broken, tmp_path / "out"))), "damaged or truncated")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_an_output_folder_in_use_is_said_once(sample_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_error(*ended(torchrun("qafe", *flags(sample_root, tmp_path))), "must be new or empty")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--nonsense"], ["--set", "train.epochs=some"], ["--data-root", "nowhere"]])
def test_bad_arguments_are_said_once(sample_root: Path, tmp_path: Path, arguments: list[str]) -> None:
    status, _, err = ended(torchrun("qafe", *flags(sample_root, tmp_path / "out"), *arguments))
    assert status == 1
    assert sum("error: " in line for line in err.splitlines()) == 1


@pytest.mark.slow
def test_an_interrupt_ends_all_processes(sample_root: Path, tmp_path: Path) -> None:
    run = torchrun("qafe", *flags(sample_root, tmp_path / "out"), "--set", "train.epochs=10000")
    assert run.stderr is not None
    assert any(line.startswith("smile epoch 2/") for line in run.stderr)
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    status, out, err = ended(run, 60)
    assert status != 0
    assert time.monotonic() - began < 30
    assert out == ""
    assert err.splitlines().count("interrupted") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compiled_models_train_in_two_processes(
    sample_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled-before"))  # Both processes compile at once.
    for name, extra in (("plain", []), ("compiled", ["--set", "train.compile=true"])):
        run = torchrun("qafe", *flags(sample_root, tmp_path / name), "--set", "train.epochs=1", *extra)
        status, _, err = ended(run, 1500)  # with nothing compiled before
        assert status == 0, err
    plain, compiled = (read_history(tmp_path / name)["smile"].best for name in ("plain", "compiled"))
    np.testing.assert_allclose(compiled.predictions, plain.predictions, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does(sample_root: Path, tmp_path: Path) -> None:
    arguments = ["--device", "cuda", "--set", "train.epochs=1", "--set", "train.precision=fp32"]
    assert main([*flags(sample_root, tmp_path / "one"), *arguments]) == 0
    status, _, err = ended(torchrun("qafe", *flags(sample_root, tmp_path / "two"), *arguments))
    assert status == 0, err
    ours, theirs = (read_history(tmp_path / name)["smile"].best for name in ("two", "one"))
    np.testing.assert_allclose(ours.predictions, theirs.predictions, atol=1e-2)
