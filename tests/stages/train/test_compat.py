"""Canary: Ray Train's private Ctrl-C handler is still as compat.py describes it."""

import inspect
import signal
from pathlib import Path

from ray.train.torch import TorchTrainer

from stages.train.compat import keep_sigint_handler


def test_ray_train_installs_its_sigint_handler_through_this_method_alone() -> None:
    method = TorchTrainer._register_sigint_handler  # type: ignore[attr-defined]
    assert list(inspect.signature(method).parameters) == ["self", "controller"]
    source = Path(inspect.getfile(method)).read_text()
    assert source.count("self._register_sigint_handler(controller)") == 1
    assert source.count("signal.signal(") == 1


def test_a_trainer_leaves_the_sigint_handler_alone() -> None:
    trainer = TorchTrainer(lambda: None)
    keep_sigint_handler(trainer)
    before = signal.getsignal(signal.SIGINT)
    trainer._register_sigint_handler(None)  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is before
