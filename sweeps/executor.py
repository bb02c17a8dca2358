"""Ray as a `concurrent.futures.Executor`: what ``python -m qafe prepare --address`` runs its videos on."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

import ray
from ray.exceptions import RayError

from qafe.errors import ConfigError


class RayExecutor(Executor):
    """Runs each call as a Ray task with one CPU; a task whose worker dies is tried once more.

    A call's own exception comes back as it was raised, without Ray's trace around it. What Ray itself fails at,
    such as a worker that dies twice, is a ``BrokenExecutor``.

    Args:
        address: of the cluster, as ``ray.init`` takes it.
    Raises:
        ConfigError: there is no cluster at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            probe(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError, RayError) as err:
            raise ConfigError(
                f"there must be a Ray cluster at {address!r} (--address), and none answers ({err}). "
                "Start one with ray start --head, or leave --address out."
            ) from err
        self._task = ray.remote(num_cpus=1, max_retries=1)(_call)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As of any executor."""
        result: Future[Any] = Future()

        def finish(answer: Future[tuple[Any, Exception | None]]) -> None:
            try:
                value, raised = answer.result()
            except RayError as err:
                raised = BrokenExecutor(f"{type(err).__name__}: {err}")
            except Exception as err:
                raised = err
            if raised is not None:
                result.set_exception(raised)
            else:
                result.set_result(value)

        result.set_running_or_notify_cancel()
        self._task.remote(fn, args, kwargs).future().add_done_callback(finish)
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leaves the cluster; what still runs there is given up."""
        ray.shutdown()


def probe(address: str) -> None:
    """Raises OSError where nobody listens at a host and port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Exception | None]:
    """(result, what was raised)."""
    try:
        return fn(*args, **kwargs), None
    except Exception as err:
        return None, err
