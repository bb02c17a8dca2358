"""How many trials run side by side on the connected Ray: each has its CPUs and GPUs on one node."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from qafe import allocation
from qafe.errors import ConfigError

from .plan import Plan
from .room import side_by_side

PATIENCE_S = 10.0
"""How long Ray may take to find places that its nodes have, before they count as taken by others."""


def places(plan: Plan) -> int:
    """How many trials the nodes have room for; what others do there does not count.

    Raises:
        ConfigError: for none.
    """
    nodes = _nodes().values()
    found = sum(side_by_side(*node, plan.cpus_per_trial, plan.gpus_per_trial) for node in nodes)
    if not found:
        there = "; ".join(sorted({f"{cpus:g} CPU, {gpus:g} GPU" for cpus, gpus in nodes}))
        raise ConfigError(
            f"a trial must have {plan.cpus_per_trial:g} CPU and {plan.gpus_per_trial:g} GPU on one node of Ray, and "
            f"the nodes have {there} (--cpus-per-trial, --gpus-per-trial). Name fewer, or add such a node."
        )
    return found


def places_here(cpus_per_trial: float, gpus_per_trial: float) -> int:
    """How many trials the node of this worker has room for; without Ray, this machine."""
    if ray.is_initialized():
        node = _nodes()[ray.get_runtime_context().get_node_id()]
    else:
        node = (allocation.cores(), allocation.gpus())
    return max(1, side_by_side(*node, cpus_per_trial, gpus_per_trial))


@contextlib.contextmanager
def reserved(plan: Plan) -> Iterator[list[PlacementGroup]]:
    """Places for as many of a sweep's trials as Ray can run at once now; they are given back with the block.

    Raises:
        ConfigError: no node has room for a trial, or none now.
    """
    bundle = {"CPU": plan.cpus_per_trial} | ({"GPU": plan.gpus_per_trial} if plan.gpus_per_trial else {})
    groups = [placement_group([bundle]) for _ in range(min(places(plan), plan.trials))]
    try:
        deadline = time.monotonic() + PATIENCE_S
        found = [group for group in groups if group.wait(max(deadline - time.monotonic(), 0.1))]
        if not found:
            raise ConfigError(
                f"all {len(groups)} places for trials are taken by others' work on this Ray. Wait until one is free."
            )
        yield found
    finally:
        for group in groups:
            remove_placement_group(group)


def _nodes() -> dict[str, tuple[float, float]]:
    """CPUs and GPUs of each node that is alive."""
    return {
        node["NodeID"]: (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }
