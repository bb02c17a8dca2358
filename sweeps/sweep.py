"""What a study is: which settings are searched, over what, and which point comes first."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution

from qafe.config import Config
from qafe.device import pick_device
from qafe.dotted import flatten, override
from qafe.errors import ConfigError


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
        """One of the choices: texts, numbers or booleans."""
        for choice in choices:
            if not isinstance(choice, str | int | float):
                raise ConfigError(f"a choice of {name} must be a text, a number or a boolean, got {choice!r}.")
        return self._fixed[name] if name in self._fixed else self.trial.suggest_categorical(name, choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        return int(self._fixed[name]) if name in self._fixed else self.trial.suggest_int(name, low, high)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from low to high."""
        return float(self._fixed[name]) if name in self._fixed else self.trial.suggest_float(name, low, high, log=log)


Space = Callable[[Suggester], None]
"""A define-by-run function: it suggests settings by their dotted names, and may read the config it starts from."""


@dataclass(frozen=True)
class Grid:
    """A space that is run point by point in place of being searched: every combination of some settings' values."""

    values: Mapping[str, Sequence[Any]]

    def __call__(self, trial: Suggester) -> None:
        for name, choices in self.values.items():
            trial.suggest_categorical(name, choices)

    def points(self, names: Collection[str]) -> list[dict[str, Any]]:
        """All combinations of these settings' values; the last setting changes fastest."""
        axes = {name: choices for name, choices in self.values.items() if name in names}
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A search, or a grid of trainings, that can be run on any cohort with any preset.

    Attributes:
        name: what ``python -m sweeps.run`` calls it, and the MLflow experiment.
        about: one line for people.
        space: a module-level function, so that it can be pickled, or a `Grid`.
        trials: how many trials are run unless ``--trials`` says otherwise; a grid has its points.
        grace_epochs: epochs that every trial gets before it may be stopped early.
        expressions: what ``--expression`` is unless it is given, e.g. ``all``.
        source: text of the user's file that the sweep came from.

    Raises:
        ConfigError: one of them cannot be.
    """

    name: str
    about: str
    space: Space
    trials: int = 16
    grace_epochs: int = 4
    expressions: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            raise ConfigError(
                f"a study's name is made of letters, digits, '.', '_' and '-', got {self.name!r}. Rename it."
            )
        if not callable(self.space):
            raise ConfigError(f"the space of a study is a function or a Grid, got {self.space!r} ({self.name}).")
        for name, value in (("trials", self.trials), ("grace_epochs", self.grace_epochs)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value} (study {self.name}). Name a larger number.")

    @property
    def is_grid(self) -> bool:
        """Whether all of its points are run, and none is chosen."""
        return isinstance(self.space, Grid)

    def names(self, base: Config) -> frozenset[str]:
        """The settings that the space may touch, on any branch (probed with random draws).

        Raises:
            ConfigError: one of them does not exist; the nearest name is offered.
        """
        found = frozenset(name for point in self._draws(base, frozenset()) for name in point)
        flat = flatten(base)
        for name in sorted(found - set(flat)):
            near = difflib.get_close_matches(name, flat, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no setting named {name!r} (the space of {self.name}).{hint}")
        return found

    def check(self, base: Config, pinned: frozenset[str] = frozenset()) -> None:
        """Makes sure that every point of the space is a config, its ends included (probed with random draws).

        Raises:
            ConfigError: one is not, or the first trial cannot be; see `baseline`.
        """
        self.baseline(base, pinned)
        for point in self._draws(base, pinned):
            try:
                override(base, point)
            except ConfigError as err:
                raise ConfigError(f"the space of {self.name} has a point that is no config: {err}") from err

    def baseline(self, base: Config, pinned: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The base config's own values of the searched settings: the first trial of every sweep.

        Raises:
            ConfigError: one of them is outside the space, or nothing is left to search.
        """
        flat = flatten(base)
        point = {name: flat[name] for name in sorted(self.names(base) - pinned)}
        if not point:
            raise ConfigError(f"study {self.name} has nothing left to search: all of its settings are fixed.")
        _, outside = self.place(base, pinned, point)
        if outside:
            raise ConfigError(
                f"the first trial must lie in the space of {self.name}: {', '.join(outside)} of the preset does not "
                f"({', '.join(str(point[name]) for name in outside)}). Use another --set, or widen the space."
            )
        return point

    def points(self, base: Config, pinned: frozenset[str] = frozenset()) -> list[dict[str, Any]]:
        """What is run before anything is chosen: the baseline, and of a grid all the other points behind it."""
        baseline = self.baseline(base, pinned)
        if not isinstance(self.space, Grid):
            return [baseline]
        return [baseline, *(point for point in self.space.points(baseline) if point != baseline)]

    def place(
        self, base: Config, pinned: frozenset[str], values: Mapping[str, Any]
    ) -> tuple[dict[str, BaseDistribution], list[str]]:
        """Walks through the space with given values, and returns the distributions on their branch, and the names of
        the settings whose value is outside of theirs or not given at all."""
        trial = _Walk(values)
        self.space(Suggester(trial, base, pinned))
        return trial.distributions, trial.outside

    def _draws(self, base: Config, pinned: frozenset[str], count: int = 200) -> Iterator[dict[str, Any]]:
        study = optuna.create_study(sampler=_ToTheEnds(seed=0))
        for _ in range(count):
            trial = study.ask()
            try:
                self.space(Suggester(trial, base, pinned))
            except ValueError as err:  # Optuna's, e.g. choices that change from trial to trial
                raise ConfigError(f"the space of {self.name} cannot be searched: {err}") from err
            yield dict(trial.params)


class _Walk(optuna.trial.FixedTrial):
    """A trial of no study, with values that are given: it notes what is missing or outside, and goes on."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(dict(values))
        self.outside: list[str] = []

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        self._distributions[name] = distribution
        with contextlib.suppress(KeyError, ValueError):
            if distribution._contains(distribution.to_internal_repr(self._params[name])):
                return self._params[name]
        self.outside.append(name)
        return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low  # type: ignore[attr-defined]


class _ToTheEnds(optuna.samplers.RandomSampler):
    """Random draws of which every second one is an end of its range: there a value outside of what a setting may be
    is found first."""

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        drawn = super().sample_independent(study, trial, param_name, param_distribution)
        if isinstance(param_distribution, CategoricalDistribution) or self._rng.rng.random() < 0.5:
            return drawn
        return param_distribution.low if self._rng.rng.random() < 0.5 else param_distribution.high


def trial_device(gpus: float) -> torch.device:
    """The device that a trial was given; Ray does not hide the GPUs of a machine from trials that asked for none."""
    return pick_device() if gpus > 0 else torch.device("cpu")
