"""Which colours does the page use, on light and on dark paper?

Charts are drawn with the light ones; when a drawing goes into the page, each becomes a CSS variable
of its name. Blue against vermilion stays apart under every common colour blindness.
"""

from typing import NamedTuple


class Colour(NamedTuple):
    light: str
    dark: str


PALETTE: dict[str, Colour] = {
    "paper": Colour("#fefdfb", "#15191c"),
    "raised": Colour("#f5f4f0", "#1d2327"),
    "ink": Colour("#1c2226", "#e4e8ea"),
    "soft": Colour("#59646d", "#9ba7b0"),
    "rule": Colour("#d8dbdc", "#384148"),
    "grid": Colour("#e9eae9", "#283036"),
    "chosen": Colour("#0b62a4", "#62b1ea"),
    "rejected": Colour("#c44e16", "#f2905c"),
    "neutral": Colour("#66737d", "#8f9ca6"),
    "held-out": Colour("#7d3c98", "#cb9ee4"),
    "noise": Colour("#dcd4bd", "#4d4832"),
    "run-1": Colour("#0b61a3", "#63b2eb"),
    "run-2": Colour("#c44f17", "#f3915d"),
    "run-3": Colour("#13795b", "#4fc39e"),
    "run-4": Colour("#a03c78", "#e58bc0"),
    "run-5": Colour("#7c6a00", "#d3bd49"),
    "run-6": Colour("#4d545a", "#b4bcc2"),
}

NUM_RUN_COLOURS = sum(name.startswith("run-") for name in PALETTE)

_NAME_BY_LIGHT = {colour.light: name for name, colour in PALETTE.items()}
assert len(_NAME_BY_LIGHT) == len(PALETTE), "a colour is told by its light value"


def css_reference(hex_colour: str) -> str:
    """Give the CSS variable of a light colour."""
    return f"var(--{_NAME_BY_LIGHT[hex_colour.lower()]})"


def css_variables(*, is_dark: bool) -> str:
    """Declare all colours, for the page's style sheet."""
    shades = ((name, c.dark if is_dark else c.light) for name, c in PALETTE.items())
    return " ".join(f"--{name}: {shade};" for name, shade in shades)
