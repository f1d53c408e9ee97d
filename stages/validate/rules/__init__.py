"""Rules: what must hold for a pair, and what is worth a warning.

A rule is an entry of CODES (its meaning and level) and one of RULES: a function that yields each
place that breaks it, and a cheap screen that spares most pairs that function.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from stages.validate.codes import CODES, Finding, Level
from stages.validate.config import Thresholds
from stages.validate.rules import answers, structure, texts
from stages.validate.rules.pair_view import PairView
from stages.validate.rules.structure import Spots

Screen = Callable[[PairView, Thresholds], bool]


class Rule(NamedTuple):
    check: Callable[[PairView, Thresholds], Spots]
    screen: Screen | None = None
    """False only for pairs that cannot break the rule."""


RULES: dict[str, Rule] = {
    "PROMPT_EMPTY": Rule(structure.find_empty_prompt, structure.may_be_empty),
    "CHOSEN_EMPTY": Rule(structure.find_empty_chosen, structure.may_be_empty),
    "REJECTED_EMPTY": Rule(structure.find_empty_rejected, structure.may_be_empty),
    "SYSTEM_NOT_FIRST": Rule(structure.find_late_system, structure.has_role_faults),
    "PROMPT_LAST_ROLE": Rule(structure.find_unanswerable_prompt, structure.has_role_faults),
    "COMPLETION_FIRST_ROLE": Rule(structure.find_wrong_first_role, structure.has_role_faults),
    "FINAL_NOT_ASSISTANT": Rule(structure.find_wrong_last_role, structure.has_role_faults),
    "ROLE_ORDER": Rule(structure.find_repeated_role, structure.has_role_faults),
    "TOOL_RESULT_ORPHAN": Rule(structure.find_orphan_results, structure.has_tool_results),
    "CHOSEN_EQ_REJECTED": Rule(structure.find_equal_answers, structure.may_be_equal),
    "FIELD_TOO_LONG": Rule(texts.find_long_text, texts.may_be_too_long),
    "NUL_IN_TEXT": Rule(texts.find_nul, texts.has_nul),
    "SOURCE_UNSAFE_NAME": Rule(texts.find_unsafe_name, texts.may_have_unsafe_name),
    "SCORE_NONFINITE": Rule(structure.find_nonfinite_score, structure.has_scores),
    "SCORE_CONTRADICTS_LABEL": Rule(structure.find_contradiction, structure.has_scores),
    "TIE": Rule(structure.find_tie, structure.has_scores),
    "WEIGHT_INVALID": Rule(structure.find_bad_weight, structure.has_weight),
    "CHOSEN_NEAR_REJECTED": Rule(answers.find_near_identity),
    "TOOL_CALL_UNKNOWN": Rule(structure.find_unknown_calls, structure.has_declared_tools),
    "REASONING_ONE_SIDED": Rule(answers.find_one_sided_reasoning, answers.is_not_plain),
    "REFUSAL_BOILERPLATE": Rule(answers.find_boilerplate),
    "REPETITION": Rule(answers.find_repetition),
    "TRANSCRIPT_MARKER": Rule(texts.find_turn_markers, texts.may_have_turn_markers),
    "SPECIAL_TOKEN_IN_TEXT": Rule(texts.find_special_tokens, texts.may_have_special_tokens),
    "CONTROL_CHARS": Rule(texts.find_control_chars, texts.has_controls),
    "BIDI_OVERRIDE": Rule(texts.find_bidi_override, texts.has_bidi),
    "REPLACEMENT_CHAR": Rule(texts.find_replacement_char, texts.has_replacement_char),
}


class PairRules:
    """The rules with a recipe's levels and thresholds.

    Args:
        levels: levels of codes that a recipe sets.
        thresholds: the numbers that some rules compare with.
    """

    def __init__(self, levels: Mapping[str, Level], thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._levels = {code: levels.get(code, CODES[code].level) for code in CODES}
        # A screen that several rules in a row share is asked once.
        self._groups: list[tuple[Screen | None, list[str]]] = []
        for code, rule in RULES.items():
            if self._levels[code] == "off":
                continue
            if rule.screen is None or not self._groups or self._groups[-1][0] is not rule.screen:
                self._groups.append((rule.screen, []))
            self._groups[-1][1].append(code)

    def check(self, pair: PairView) -> tuple[list[Finding], list[Finding]]:
        """Apply all rules to a pair.

        Returns:
            The findings that reject it and those that are warnings (the conversion's own first).
        """
        thresholds = self._thresholds
        found = list(pair.draft.warnings)
        for screen, codes in self._groups:
            if screen is None or screen(pair, thresholds):
                for code in codes:
                    for path, detail in RULES[code].check(pair, thresholds):
                        found.append(Finding(code, path, detail))
        if not found:
            return [], []
        return self._select(found, "reject"), self._select(found, "warn")

    def _select(self, found: list[Finding], level: Level) -> list[Finding]:
        return [finding for finding in found if self._levels[finding.code] == level]
