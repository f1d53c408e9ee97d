"""Which runs survive a rung."""

from pipeline.commands.sweep.halving import choose_survivors


def test_the_better_half_survives_and_ties_go_by_name() -> None:
    """Of five, three survive; c and d tie for the last place."""
    assert choose_survivors({"d": 2.0, "a": 3.0, "b": 1.0, "c": 2.0, "e": 1.5}) == {"b", "e", "c"}
    assert choose_survivors({"b": 1.0, "a": 1.0}) == {"a"}
