"""What a study is: which settings are searched, over what, and which point comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import torch

from qafe.config import Config, flatten, override
from qafe.errors import ConfigError
from qafe.train import pick_device


class Suggester:
    """Optuna's trial as a space sees it; settings that are pinned keep the base config's value.

    Args:
        trial: the trial that is asked.
        base: the config that the settings are changes of.
        pinned: settings that are not searched, although the space names them.
    """

    def __init__(self, trial: optuna.trial.BaseTrial, base: Config, pinned: frozenset[str] = frozenset()) -> None:
        self.trial = trial
        self.base = base
        self._fixed = {name: value for name, value in flatten(base).items() if name in pinned}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return self._fixed[name] if name in self._fixed else self.trial.suggest_categorical(name, choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        return int(self._fixed[name]) if name in self._fixed else self.trial.suggest_int(name, low, high)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from low to high."""
        return float(self._fixed[name]) if name in self._fixed else self.trial.suggest_float(name, low, high, log=log)


Space = Callable[[Suggester], None]
"""A define-by-run function: it suggests settings by their dotted names, and may read the config it starts from."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A search that can be run on any cohort with any preset.

    Attributes:
        name: what ``python -m sweeps.run`` calls it.
        about: one line for people.
        space: a module-level function, so that it can be pickled.
        trials: how many trials are run unless ``--trials`` says otherwise.
        grace_epochs: epochs that every trial gets before it may be stopped early.
    """

    name: str
    about: str
    space: Space
    trials: int = 16
    grace_epochs: int = 4

    def names(self, base: Config) -> frozenset[str]:
        """The settings that the space may touch, on any branch (probed with random draws)."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        found: set[str] = set()
        for _ in range(200):
            trial = study.ask()
            self.space(Suggester(trial, base))
            found |= set(trial.params)
        return frozenset(found)

    def baseline(self, base: Config, pinned: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The base config's own values of the searched settings: the first trial of every sweep.

        Raises:
            ConfigError: one of them is outside the space, or nothing is left to search.
        """
        flat = flatten(base)
        point = {name: flat[name] for name in sorted(self.names(base) - pinned)}
        if not point:
            raise ConfigError(f"study {self.name} has nothing left to search: all of its settings are fixed.")
        study = optuna.create_study()
        study.enqueue_trial(point)
        trial = study.ask()
        try:
            self.space(Suggester(trial, base, pinned))
        except ValueError as err:
            raise ConfigError(
                f"the first trial must lie in the space of {self.name}: {err}. Use another --set."
            ) from err
        assert override(base, trial.params) == base
        return point


def trial_device(gpus: float) -> torch.device:
    """The device that a trial was given; Ray does not hide the GPUs of a machine from trials that asked for none."""
    return pick_device() if gpus > 0 else torch.device("cpu")
