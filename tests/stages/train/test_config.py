"""Learning rates worked by hand."""

from typing import Literal

import pytest

from schemas.config import dump_config, parse_config
from schemas.errors import ConfigError
from stages.train import LoraSettings, TrainConfig


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8]),
        ("constant", 2, [4, 8, 8, 8, 8, 8]),
        ("linear", 0, [8, 8 * 5 / 6, 8 * 4 / 6, 4, 8 * 2 / 6, 8 / 6]),
        ("linear", 2, [4, 8, 8, 6, 4, 2]),
        # cos of 0, 60, 120 degrees: 1, 1/2, -1/2.
        ("cosine", 3, [8 / 3, 16 / 3, 8, 8, 6, 2]),
        ("linear", 6, [8 / 6, 16 / 6, 4, 32 / 6, 40 / 6, 8]),
    ],
)
def test_learning_rates(
    schedule: Literal["constant", "linear", "cosine"], warmup_steps: int, expected: list[float]
) -> None:
    config = TrainConfig(learning_rate=8, lr_schedule=schedule, warmup_steps=warmup_steps)
    rates = [config.learning_rate_at(step, num_steps=6) for step in range(1, 7)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("names", [[], ["all-linear"], ["q_proj", "all-linear"]])
def test_all_linear_stands_alone_and_a_list_has_names(names: list[str]) -> None:
    """peft would take all-linear in a list as a layer's name, and train no layer."""
    with pytest.raises(ConfigError, match=r"target_modules.*all-linear, or a list of at least one"):
        parse_config(TrainConfig, {"lora": {"target_modules": names}}, path="stages.train")


def test_adapter_keys_at_their_defaults_are_not_hashed() -> None:
    """Trainings of adapters made before there were these keys keep their fingerprints."""
    assert dump_config(LoraSettings()).keys() == {"rank", "alpha", "dropout", "target_modules"}
    changed = LoraSettings(use_dora=True, use_rslora=True, quantization="nf4")
    assert dump_config(changed).keys() == {
        *dump_config(LoraSettings()),
        "use_dora",
        "use_rslora",
        "quantization",
    }
