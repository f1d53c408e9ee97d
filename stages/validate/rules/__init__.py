"""Rules: what every pair must satisfy, and what is worth a warning.

To add a rule, write its function in one of the modules here and its entry in RULES.
"""

from stages.validate.rules import answers, structure, texts
from stages.validate.rules.rule import Rule

_NEEDED = "later stages rely on it"

# In the order in which a row's codes are listed; the first is its main code.
RULES: dict[str, Rule] = {
    "PROMPT_EMPTY": Rule(
        "reject",
        "The prompt has no visible text.",
        structure.find_empty_prompt,
        structure.may_be_empty,
        why_fixed=_NEEDED,
    ),
    "CHOSEN_EMPTY": Rule(
        "reject",
        "The chosen answer has no visible text.",
        structure.find_empty_chosen,
        structure.may_be_empty,
        why_fixed=_NEEDED,
    ),
    "REJECTED_EMPTY": Rule(
        "reject",
        "The rejected answer has no visible text.",
        structure.find_empty_rejected,
        structure.may_be_empty,
        why_fixed=_NEEDED,
    ),
    "SYSTEM_NOT_FIRST": Rule(
        "reject",
        "A system message is not at the start.",
        structure.find_late_system,
        structure.has_role_faults,
    ),
    "PROMPT_LAST_ROLE": Rule(
        "reject",
        "The prompt does not end with a user's message or a tool's result.",
        structure.find_unanswerable_prompt,
        structure.has_role_faults,
    ),
    "COMPLETION_FIRST_ROLE": Rule(
        "reject",
        "An answer does not begin with the assistant.",
        structure.find_wrong_first_role,
        structure.has_role_faults,
    ),
    "FINAL_NOT_ASSISTANT": Rule(
        "reject",
        "An answer does not end with the assistant.",
        structure.find_wrong_last_role,
        structure.has_role_faults,
    ),
    "ROLE_ORDER": Rule(
        "reject",
        "A user or assistant speaks twice in a row.",
        structure.find_repeated_role,
        structure.has_role_faults,
    ),
    "TOOL_RESULT_ORPHAN": Rule(
        "reject",
        "A tool's result follows no call, or names a call that was not made.",
        structure.find_orphan_results,
        structure.has_tool_results,
    ),
    "CHOSEN_EQ_REJECTED": Rule(
        "reject",
        "Both answers are the same except for outer white space and Unicode composition.",
        structure.find_equal_answers,
        structure.may_be_equal,
    ),
    "FIELD_TOO_LONG": Rule(
        "reject",
        "A text has more characters than allowed.",
        texts.find_long_text,
        texts.may_be_too_long,
        threshold="max_text_chars",
    ),
    "NUL_IN_TEXT": Rule(
        "reject",
        "A text contains NUL, which other programs cut off at or refuse.",
        texts.find_nul,
        texts.has_nul,
    ),
    "SOURCE_UNSAFE_NAME": Rule(
        "reject",
        "The source or source_id is too long, has characters that cannot be printed, or climbs "
        "directories with `..`; slashes are allowed.",
        texts.find_unsafe_name,
        texts.may_have_unsafe_name,
        threshold="max_name_bytes",
    ),
    "SCORE_NONFINITE": Rule(
        "reject",
        "A score is NaN or infinite.",
        structure.find_nonfinite_score,
        structure.has_scores,
        why_fixed=_NEEDED,
    ),
    "SCORE_CONTRADICTS_LABEL": Rule(
        "reject",
        "The chosen answer has the lower score.",
        structure.find_contradiction,
        structure.has_scores,
    ),
    "TIE": Rule(
        "reject",
        "The scores are equal, or the label prefers neither answer.",
        structure.find_tie,
        structure.has_scores,
    ),
    "WEIGHT_INVALID": Rule(
        "reject",
        "The weight is not a number above 0 that a 32-bit float can hold.",
        structure.find_bad_weight,
        structure.has_weight,
        why_fixed=_NEEDED,
    ),
    "CHOSEN_NEAR_REJECTED": Rule(
        "warn",
        "The answers use nearly the same words.",
        answers.find_near_identity,
        threshold="near_jaccard",
    ),
    "TOOL_CALL_UNKNOWN": Rule(
        "warn",
        "A call names a tool that the row does not declare.",
        structure.find_unknown_calls,
        structure.has_declared_tools,
    ),
    "REASONING_ONE_SIDED": Rule(
        "warn",
        "Only one answer has reasoning: training would reward having it.",
        answers.find_one_sided_reasoning,
        answers.is_not_plain,
    ),
    "REFUSAL_BOILERPLATE": Rule(
        "warn",
        "The chosen answer speaks as an AI model, or declines in a set phrase.",
        answers.find_boilerplate,
    ),
    "REPETITION": Rule(
        "warn",
        "An answer repeats ten words at least three times, and they are much of it.",
        answers.find_repetition,
        threshold="repeated_share",
    ),
    "TRANSCRIPT_MARKER": Rule(
        "warn",
        "A message has the turn markers of a transcript, so more than one speaker is in it.",
        texts.find_turn_markers,
        texts.may_have_turn_markers,
    ),
    "SPECIAL_TOKEN_IN_TEXT": Rule(
        "warn",
        "A text has what looks like a chat template's control token, such as `<|im_end|>`.",
        texts.find_special_tokens,
        texts.may_have_special_tokens,
    ),
    "MEDIA_PLACEHOLDER": Rule(
        "warn",
        "A text has what looks like the place of a picture, sound or film, such as `<image>`, but "
        "the row has none.",
        texts.find_media_placeholders,
        texts.may_have_special_tokens,
    ),
    "MISSING_AS_TEXT": Rule(
        "warn",
        "The prompt or an answer is only a word that tables have for a missing cell, such as NA, "
        "NaN, null or None.",
        texts.find_missing_as_text,
        texts.may_be_missing,
    ),
    "CONTROL_CHARS": Rule(
        "warn",
        "A text has control characters other than tab, newline, return and NUL.",
        texts.find_control_chars,
        texts.has_controls,
    ),
    "BIDI_OVERRIDE": Rule(
        "warn",
        "A text has characters that reverse the direction of writing.",
        texts.find_bidi_override,
        texts.has_bidi,
    ),
    "REPLACEMENT_CHAR": Rule(
        "warn",
        "A text has U+FFFD, the replacement for bytes that could not be decoded.",
        texts.find_replacement_char,
        texts.has_replacement_char,
    ),
}
