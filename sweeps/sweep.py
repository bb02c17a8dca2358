"""What a study is: which settings are searched, over what, and which point comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna

from qafe.config import Config

Space = Callable[[optuna.trial.BaseTrial, Config], None]
"""A define-by-run function: it suggests settings by their dotted names, and may read the config it starts from."""


@dataclass(frozen=True, kw_only=True)
class Study:
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

    def names(self, base: Config) -> set[str]:
        """The settings that the space may touch, on any branch (probed with random draws)."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        found: set[str] = set()
        for _ in range(200):
            trial = study.ask()
            self.space(trial, base)
            found |= set(trial.params)
        return found

    def baseline(self, base: Config) -> dict[str, Any]:
        """The preset's own values of the searched settings: the first trial of every sweep."""
        from qafe.config import flatten

        flat = flatten(base)
        return {name: flat[name] for name in sorted(self.names(base))}
