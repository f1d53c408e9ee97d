"""Ctrl-C during Ray Train ends a run as it does anywhere else: with KeyboardInterrupt."""

import signal

import pytest

from stages.train import _interrupts_as_usual


def leave_as_ray_train_does() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(0)


def test_an_exit_is_an_interrupt_and_the_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interrupts_as_usual():
        leave_as_ray_train_does()
    assert signal.getsignal(signal.SIGINT) is before
