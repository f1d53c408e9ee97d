"""What can become of a pair here, and what does each code mean?"""

DUP_EXACT = "DUP_EXACT"
DUP_NEAR = "DUP_NEAR"
LABEL_CONFLICT = "LABEL_CONFLICT"
SPLIT_LEAK = "SPLIT_LEAK"
EVAL_CONTAMINATED = "EVAL_CONTAMINATED"
PROMPT_CAP = "PROMPT_CAP"
PREFERENCE_CYCLE = "PREFERENCE_CYCLE"
NEAR_DUP_KEPT = "NEAR_DUP_KEPT"

REASONS = {
    DUP_EXACT: "Prompt and answers read the same as another pair's.",
    DUP_NEAR: "Prompt and answers are nearly the same as another pair's.",
    LABEL_CONFLICT: "The same two answers to this prompt stand elsewhere with opposite labels.",
    SPLIT_LEAK: "A pair for training whose prompt is, nearly, one that is held out.",
    EVAL_CONTAMINATED: "The prompt or the chosen answer holds a benchmark's.",
    PROMPT_CAP: "The prompt has more pairs than max_pairs_per_prompt allows.",
}
"""Why a pair goes."""

WARNINGS = {
    PREFERENCE_CYCLE: "Preferences among answers to this prompt go round in a circle.",
    NEAR_DUP_KEPT: "Nearly another kept pair, but a number, an operator or a negation differs.",
}
"""What is noted on pairs that stay."""

CODES = {**REASONS, **WARNINGS}
