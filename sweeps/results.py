"""What a trial reports to its driver, by name.

Apart from both: a worker must not load what only the driver needs (MLflow takes seconds and memory of every worker).
"""

from __future__ import annotations

OBJECTIVE = "best_spearman"
"""What a sweep maximises: the mean over expressions of the best epoch's validation Spearman."""
FINISHED = "finished"
FAILED_AS = "failed_as"
"""What a trial reports as the class of its failure; see `sweeps.trial`."""
DIVERGED = "diverged"
NO_SKILL = -1.0
"""What the study hears of the epoch in which a loss was not finite: the lowest Spearman there is."""
