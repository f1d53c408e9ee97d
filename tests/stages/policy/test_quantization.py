"""Canary of the private part of bitsandbytes that stages/policy/quantization.py uses."""

from bitsandbytes.nn import Linear4bit  # type: ignore[attr-defined]


def test_linear4bit_still_has_the_switch_for_repacking() -> None:
    """If it is renamed, weights are repacked in evaluation mode again."""
    assert "support_avx512bf16_for_cpu" in vars(Linear4bit(64, 64))
