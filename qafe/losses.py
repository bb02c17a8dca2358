"""What training minimises: `LOSSES` by name, built by `build_loss`.

Every loss is a module ``(prediction, target) -> scalar`` and computes in float32 at least, whatever precision
the model runs in. Each is a mean over clips, but for `BATCH_LOSSES`, whose clips see each other.
Shapes: B clips of a batch, N labels of the training set, K components of a mixture.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .config import TrainConfig
from .errors import ConfigError

MIXTURE_COMPONENTS = 8
"""Largest number of components in the mixture of labels."""


class BalancedMSE(nn.Module):
    """BMC: tells each clip's own target from the batch's other targets, so that rare scores count as much.

    Each prediction is the mean of a Gaussian over targets; the loss is the cross entropy of finding one's own
    target among the batch's, times 2 sigma squared.
    Source: arXiv:2203.16427, batch-based Monte Carlo. Differs: none in value; a batch of one, which
    the published code accepts and learns nothing from, is an error. It ranks rather than anchors: predictions may
    drift from the scale of the labels.

    Args:
        sigma: standard deviation of the label noise.
        train_sigma: the optimiser may change sigma.
    """

    def __init__(self, sigma: float, *, train_sigma: bool = False) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.tensor(float(sigma)), requires_grad=train_sigma)

    def forward(self, prediction: Float[Tensor, " B"], target: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of one batch.

        Raises:
            ConfigError: a batch of one.
        """
        prediction, target = _at_least_float32(prediction, target)
        if len(prediction) < 2:
            raise ConfigError(
                "loss 'bmc' needs at least 2 clips in every batch (it compares targets within the batch; one always "
                f"gives zero loss), got {len(prediction)}. Set train.batch_size=4 and drop a last batch of one, "
                "or set train.loss=mse."
            )
        variance = self.sigma**2
        logits = -((prediction[:, None] - target[None, :]) ** 2) / (2 * variance)  # B B
        own = torch.arange(len(target), device=target.device)
        return F.cross_entropy(logits, own) * (2 * variance).detach()


class GaussianMixtureMSE(nn.Module):
    """GAI: squared error, balanced by a mixture of Gaussians fitted to the training labels.

    Source: arXiv:2203.16427, Gaussian-mixture analytical integration, times 2 sigma squared as in its
    released code.

    Args:
        sigma: standard deviation of the label noise.
        means, variances, weights: the mixture, from `fit_mixture`.
        train_sigma: the optimiser may change sigma.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor

    def __init__(
        self,
        sigma: float,
        *,
        means: Float[Tensor, " K"],
        variances: Float[Tensor, " K"],
        weights: Float[Tensor, " K"],
        train_sigma: bool = False,
    ) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.tensor(float(sigma)), requires_grad=train_sigma)
        self.register_buffer("means", means.double())
        self.register_buffer("variances", variances.double())
        self.register_buffer("weights", weights.double())

    def forward(self, prediction: Float[Tensor, " B"], target: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of one batch."""
        prediction, target = _at_least_float32(prediction, target)
        variance = self.sigma**2
        own = (prediction - target) ** 2 / (2 * variance) + variance.log() / 2  # B
        spread = self.variances + variance  # K
        near = (prediction[:, None] - self.means) ** 2 / (2 * spread)  # B K
        everywhere = torch.logsumexp(self.weights.log() - spread.log() / 2 - near, dim=1)  # B
        loss = (own + everywhere).mean() * (2 * variance).detach()
        return loss.to(prediction.dtype)


class FocalLoss(nn.Module):
    """Squared or absolute error, weighted down where it is already small.

    The weight is ``(2 * sigmoid(beta * error) - 1) ** gamma``, or ``tanh(beta * error) ** gamma``.
    Source: Focal-R of arXiv:2102.09554, in the form of its released code.

    Args:
        power: 2 for squared, 1 for absolute error.
        beta: how fast the weight grows with the error.
        gamma: how strongly small errors are weighted down.
        activate: the shape of the weight.
    """

    def __init__(
        self,
        power: Literal[1, 2],
        *,
        beta: float = 0.2,
        gamma: float = 1.0,
        activate: Literal["sigmoid", "tanh"] = "sigmoid",
    ) -> None:
        super().__init__()
        self.power, self.beta, self.gamma, self.activate = power, beta, gamma, activate

    def forward(self, prediction: Float[Tensor, " B"], target: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of one batch."""
        prediction, target = _at_least_float32(prediction, target)
        error = (prediction - target).abs()
        grown = self.beta * error
        weight = torch.tanh(grown) if self.activate == "tanh" else 2 * torch.sigmoid(grown) - 1
        return (error**self.power * weight**self.gamma).mean()


class PlainLoss(nn.Module):
    """One of PyTorch's own regression losses, as a mean over the batch."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, prediction: Float[Tensor, " B"], target: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """The loss of one batch."""
        prediction, target = _at_least_float32(prediction, target)
        return self.function(prediction, target)


def fit_mixture(
    labels: Float[Tensor, " N"], *, components: int = MIXTURE_COMPONENTS, steps: int = 200, floor: float = 1e-4
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Means, variances and weights of a mixture of Gaussians over the labels, in float64.

    Expectation maximisation (Bishop, Pattern Recognition and Machine Learning, section 9.2), started at evenly
    spaced distinct labels, so the same labels always give the same mixture. K is the number of distinct
    labels where that is below ``components``; a component then sits on each label.

    Args:
        components: largest K.
        steps: rounds of expectation maximisation.
        floor: smallest variance.
    Raises:
        ConfigError: no label, or one that is not finite.
    """
    x = labels.detach().double().cpu().flatten()
    if x.numel() == 0 or not bool(torch.isfinite(x).all()):
        raise ConfigError(
            f"loss 'gai' needs finite training labels to fit its mixture, got {x.numel()} labels"
            f"{' with some that are not finite' if x.numel() else ''}. Check the manifest's scores, or set "
            "train.loss=mse."
        )
    distinct = torch.unique(x)
    k = min(components, len(distinct))
    means = distinct[torch.linspace(0, len(distinct) - 1, k).round().long()]
    gap = float((means[1:] - means[:-1]).min()) if k > 1 else 1.0
    variances = torch.full_like(means, max((gap / 4) ** 2, floor))
    weights = torch.full_like(means, 1 / k)
    for _ in range(steps):
        log_density = -((x[:, None] - means) ** 2) / (2 * variances) - (2 * math.pi * variances).log() / 2
        share = (log_density + weights.log()).softmax(dim=1)  # N K
        mass = share.sum(dim=0).clamp_min(1e-12)
        means = (share * x[:, None]).sum(dim=0) / mass
        variances = ((share * (x[:, None] - means) ** 2).sum(dim=0) / mass).clamp_min(floor)
        weights = mass / mass.sum()
    return means, variances, weights


def _bmc(config: TrainConfig, labels: Tensor) -> nn.Module:
    return BalancedMSE(config.noise_sigma, train_sigma=config.train_noise_sigma)


def _gai(config: TrainConfig, labels: Tensor) -> nn.Module:
    means, variances, weights = fit_mixture(labels)
    return GaussianMixtureMSE(
        config.noise_sigma,
        means=means,
        variances=variances,
        weights=weights,
        train_sigma=config.train_noise_sigma,
    )


def _huber(config: TrainConfig, labels: Tensor) -> nn.Module:
    delta = config.huber_delta
    return PlainLoss(lambda prediction, target: F.huber_loss(prediction, target, delta=delta))


LOSSES: dict[str, Callable[[TrainConfig, Tensor], nn.Module]] = {
    "bmc": _bmc,
    "gai": _gai,
    "focal_mse": lambda config, labels: FocalLoss(2),
    "focal_l1": lambda config, labels: FocalLoss(1),
    "mse": lambda config, labels: PlainLoss(F.mse_loss),
    "l1": lambda config, labels: PlainLoss(F.l1_loss),
    "huber": _huber,
}
"""Loss name -> builder from (training settings, training labels)."""


BATCH_LOSSES = ("bmc",)
"""The losses that compare the clips of a batch: the mean over its parts is not the loss of the whole."""


def build_loss(config: TrainConfig, labels: Float[Tensor, " N"]) -> nn.Module:
    """The loss that ``config.loss`` names, as a module ``(prediction [B], target [B]) -> scalar``.

    Args:
        labels: scores of the training set; only ``gai`` reads them.
    Raises:
        ConfigError: ``gai`` without finite labels.
    """
    return LOSSES[config.loss](config, labels)


def _at_least_float32(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(kind), target.to(kind)
