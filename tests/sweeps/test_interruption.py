"""Signals to a driver, without one."""

import os
import signal
import time

import pytest

from sweeps import interruption
from sweeps.interruption import INTERRUPTION, SIGNALS


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_ctrl_c_at_once_or_where_somebody_looks(number: int) -> None:
    with INTERRUPTION.heard():
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert INTERRUPTION.asked
    assert not INTERRUPTION.asked
    with INTERRUPTION.heard(), INTERRUPTION.deferred():
        send(number)
        send(signal.SIGTERM)  # ``timeout`` signals twice
        assert INTERRUPTION.asked


def test_who_presses_ctrl_c_again_does_not_want_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with INTERRUPTION.heard(), INTERRUPTION.deferred():
        send(signal.SIGINT)
        monkeypatch.setattr(interruption, "SAME_S", 0.05)
        time.sleep(0.1)
        send(signal.SIGTERM)  # who ends it from outside has more patience
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_is_ignored_stays_ignored_but_for_sigterm() -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        with INTERRUPTION.heard():
            send(signal.SIGINT)
            send(signal.SIGHUP)
            assert not INTERRUPTION.asked
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGTERM)
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
