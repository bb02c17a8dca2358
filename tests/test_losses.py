"""Every loss: the same contract, values by hand, and the numbers of the code that the papers released."""

import math
from typing import get_args

import pytest
import torch

from qafe.config import Loss, TrainConfig
from qafe.errors import ConfigError
from qafe.losses import (
    LOSSES,
    BalancedMSE,
    FocalLoss,
    GaussianMixtureMSE,
    build_loss,
    fit_mixture,
)

from . import reference

LABELS = torch.tensor([0.0, 0, 0, 1, 1, 2, 3, 4, 4])


def test_every_setting_has_a_loss() -> None:
    assert set(LOSSES) == set(get_args(Loss))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_contract(name: str, dtype: torch.dtype) -> None:
    loss = build_loss(TrainConfig(loss=name), LABELS)  # type: ignore[arg-type]
    target = torch.tensor([0.0, 1.0, 3.0])
    prediction = torch.tensor([0.5, 2.0, 1.0], dtype=dtype, requires_grad=True)
    value = loss(prediction, target)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(value)
    value.backward()
    assert prediction.grad is not None
    assert torch.isfinite(prediction.grad).all()
    # Each prediction is pulled towards its own target.
    assert (torch.sign(prediction.grad.float()) == torch.tensor([1.0, 1.0, -1.0])).all()


@pytest.mark.parametrize("name", LOSSES)
def test_right_predictions_cost_less(name: str) -> None:
    loss = build_loss(TrainConfig(loss=name), LABELS)  # type: ignore[arg-type]
    target = torch.tensor([0.0, 2.0, 4.0])
    assert loss(target, target) < loss(torch.tensor([4.0, 2.0, 0.0]), target)


@pytest.mark.parametrize("name", ["bmc", "gai"])
@pytest.mark.parametrize("trained", [False, True])
def test_sigma_is_trained_only_when_asked(name: str, trained: bool) -> None:
    loss = build_loss(TrainConfig(loss=name, noise_sigma=0.7, train_noise_sigma=trained), LABELS)  # type: ignore[arg-type]
    parameters = dict(loss.named_parameters())
    assert set(parameters) == {"sigma"}
    assert parameters["sigma"].item() == pytest.approx(0.7)
    assert parameters["sigma"].requires_grad is trained


def test_bmc_by_hand() -> None:
    # Two clips, sigma 1: each row is a softmax over -(p - t)^2 / 2.
    value = BalancedMSE(1.0)(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    first = -math.log(1 / (1 + math.exp(-2)))
    second = -math.log(0.5)
    assert value.item() == pytest.approx((first + second) / 2 * 2, rel=1e-6)


def test_bmc_refuses_a_batch_of_one() -> None:
    with pytest.raises(ConfigError, match=r"at least 2 clips.*got 1.*train\.batch_size=4"):
        BalancedMSE(1.0)(torch.tensor([1.0]), torch.tensor([2.0]))


def test_gai_with_one_wide_component_is_nearly_squared_error() -> None:
    wide = GaussianMixtureMSE(
        1.0, means=torch.tensor([2.0]), variances=torch.tensor([1e8]), weights=torch.tensor([1.0])
    )
    target = torch.tensor([0.0, 4.0])
    gap = wide(torch.tensor([1.0, 1.0]), target) - wide(target, target)
    assert float(gap) == pytest.approx((1 + 9) / 2, rel=1e-4)


@pytest.mark.parametrize(("power", "expected"), [(2, 4.0), (1, 2.0)])
def test_focal_by_hand(power: int, expected: float) -> None:
    value = FocalLoss(power)(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))  # type: ignore[arg-type]
    weight = 2 / (1 + math.exp(-0.2 * 2)) - 1
    assert value.item() == pytest.approx(expected * weight / 2, rel=1e-6)


def test_plain_losses_by_hand() -> None:
    prediction, target = torch.tensor([0.0, 5.0]), torch.tensor([0.5, 2.0])
    expected = {"mse": (0.25 + 9) / 2, "l1": (0.5 + 3) / 2, "huber": (0.125 + 2.5) / 2}
    for name, value in expected.items():
        loss = build_loss(TrainConfig(loss=name), LABELS)  # type: ignore[arg-type]
        assert float(loss(prediction, target)) == pytest.approx(value)
    wide = build_loss(TrainConfig(loss="huber", huber_delta=2.0), LABELS)
    assert float(wide(prediction, target)) == pytest.approx((0.125 + 2 * (3 - 1)) / 2)


def test_mixture_sits_on_few_distinct_labels() -> None:
    means, variances, weights = fit_mixture(LABELS)
    assert means.tolist() == pytest.approx([0, 1, 2, 3, 4], abs=1e-6)
    assert weights.tolist() == pytest.approx([3 / 9, 2 / 9, 1 / 9, 1 / 9, 2 / 9], abs=1e-6)
    assert (variances <= 1e-3).all()


def test_mixture_finds_two_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.randn(3000, generator=generator) * 0.3, 5 + torch.randn(1000, generator=generator) * 0.5])
    means, variances, weights = fit_mixture(labels, components=2)
    assert means.tolist() == pytest.approx([0, 5], abs=0.05)
    assert variances.sqrt().tolist() == pytest.approx([0.3, 0.5], abs=0.03)
    assert weights.tolist() == pytest.approx([0.75, 0.25], abs=0.01)


@pytest.mark.parametrize("labels", [[2.0], [2.0, 2.0, 2.0]])
def test_mixture_of_constant_labels(labels: list[float]) -> None:
    means, variances, weights = fit_mixture(torch.tensor(labels))
    assert means.tolist() == [2.0]
    assert weights.tolist() == [1.0]
    assert torch.isfinite(variances).all()


@pytest.mark.parametrize("labels", [[], [1.0, float("nan")]])
def test_mixture_refuses_labels_that_are_missing(labels: list[float]) -> None:
    with pytest.raises(ConfigError, match="finite training labels"):
        fit_mixture(torch.tensor(labels))


def test_values_and_gradients_agree_with_the_released_code() -> None:
    golden = reference.table("golden_losses")
    counted: dict[str, int] = {}
    for case in golden["cases"]:
        dtype = getattr(torch, case["dtype"])
        prediction = torch.tensor(case["pred"], dtype=torch.float64).to(dtype).requires_grad_()
        target = torch.tensor(case["target"], dtype=torch.float64).to(dtype)
        name = case["loss"]
        if name == "bmc":
            if case["b"] == 1:  # the released code gives zero; ours refuses
                assert case["value"] == 0
                with pytest.raises(ConfigError):
                    BalancedMSE(case["sigma"])(prediction, target)
                counted[name] = counted.get(name, 0) + 1
                continue
            loss: torch.nn.Module = BalancedMSE(case["sigma"], train_sigma=True).to(dtype)
        elif name == "gai":
            mixture = golden["gmms"][case["gmm"]]
            flat = {key: torch.tensor(value, dtype=torch.float64).flatten() for key, value in mixture.items()}
            loss = GaussianMixtureMSE(case["sigma"], train_sigma=True, **flat).to(dtype)
        else:
            power = 2 if name == "focal_mse" else 1
            loss = FocalLoss(power, beta=case["beta"], gamma=float(case["gamma"]), activate=case["activate"])  # type: ignore[arg-type]
        if case.get("weights") is not None:
            # Weights for each clip are no part of ours: the weighted mean of one-clip losses is the same.
            shares = torch.tensor(case["weights"], dtype=torch.float64).flatten().to(dtype)
            each = [loss(p[None], t[None]) for p, t in zip(prediction, target, strict=True)]
            value = (shares * torch.stack(each)).mean()
        else:
            value = loss(prediction, target)
        value.backward()
        # Float32 values of size v carry an error of v * 1e-7.
        near = {"abs": 1e-6, "rel": 1e-6 if case["dtype"] == "float32" else 1e-9}
        assert prediction.grad is not None
        assert value.item() == pytest.approx(case["value"], **near), case
        assert prediction.grad.tolist() == pytest.approx(case["grad_pred"], **near), case
        if "grad_sigma" in case:
            sigma = dict(loss.named_parameters())["sigma"]
            assert sigma.grad is not None
            assert float(sigma.grad) == pytest.approx(case["grad_sigma"], **near), case
        counted[name] = counted.get(name, 0) + 1
    assert set(counted) == {"bmc", "gai", "focal_mse", "focal_l1"}
    assert sum(counted.values()) == 400
