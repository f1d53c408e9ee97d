"""Formats whose rows hold two answers and a label that says which one is preferred."""

import re

from stages.validate.findings import RowFault
from stages.validate.formats.columns import (
    Columns,
    as_number,
    read_flag,
    read_number,
    read_rating,
    read_text,
)
from stages.validate.formats.conversations import split_shared_prompt
from stages.validate.formats.format import (
    Format,
    is_cell,
    is_messages,
    is_text,
    is_text_or_messages,
)
from stages.validate.formats.pair_drafts import Sides
from stages.validate.messages import Message, new_assistant, new_message
from stages.validate.strict_json import decode_strictly

_HELPSTEER_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


def order_answers(
    first: list[Message],
    second: list[Message],
    *,
    prompt: list[Message],
    is_first_better: bool,
    scores: tuple[float | None, float | None] = (None, None),
    margin: float | None = None,
) -> Sides:
    """Return two answers ordered, the better one as chosen.

    Args:
        scores: scores of the first and of the second answer.
        margin: how much better the better one is, if the row states that without scores.
    """
    answers = [(first, scores[0]), (second, scores[1])]
    (chosen, of_chosen), (rejected, of_rejected) = answers if is_first_better else answers[::-1]
    return Sides(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        score_chosen=of_chosen,
        score_rejected=of_rejected,
        margin=margin,
    )


def convert_shp(columns: Columns) -> Sides:
    """Stanford's SHP: two comments on a post with their votes; label 1 prefers A, 0 prefers B."""
    return order_answers(
        columns.take_answer("human_ref_A"),
        columns.take_answer("human_ref_B"),
        prompt=columns.take_question("history"),
        is_first_better=_read_choice(columns, "labels", first=1, second=0),
        scores=(columns.take_number("score_A"), columns.take_number("score_B")),
    )


def convert_helpsteer2(columns: Columns) -> Sides:
    """HelpSteer2's preferences: a strength from -3 (the first is better) to 3 (the second is).

    Prompts of several turns are one text, with `<extra_id_1>` lines between the turns.
    """
    return _convert_strength(
        columns,
        prompt=_read_helpsteer_turns(columns.take_text("prompt")),
        responses=("response_1", "response_2"),
        label="preference_strength",
    )


def convert_helpsteer3(columns: Columns) -> Sides:
    """HelpSteer3: a strength from -3 (the first is better) to 3; context of text or messages."""
    return _convert_strength(
        columns,
        prompt=columns.take_question_or_messages("context"),
        responses=("response1", "response2"),
        label="overall_preference",
    )


def _convert_strength(
    columns: Columns, *, prompt: list[Message], responses: tuple[str, str], label: str
) -> Sides:
    strength = read_number_label(columns.take_label(label), label, low=-3, high=3)
    if strength == 0:
        raise RowFault("TIE", label, "0")
    return order_answers(
        columns.take_answer(responses[0]),
        columns.take_answer(responses[1]),
        prompt=prompt,
        is_first_better=strength < 0,
        margin=abs(strength),
    )


def _read_helpsteer_turns(text: str) -> list[Message]:
    first, *parts = _HELPSTEER_TURN.split(text)
    turns = [new_message("user", first)]
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        is_user = speaker == "User"
        turns.append(new_message("user", said) if is_user else new_assistant(said, "prompt"))
    return turns


def convert_arena(columns: Columns) -> Sides:
    """LMSYS' arena: two conversations with two models, and a winner.

    After the first turn the models' own answers differ, so there is no common prompt.
    """
    is_first_better = _read_winner(columns)
    conversations = columns.take_messages("conversation_a"), columns.take_messages("conversation_b")
    chosen, rejected = conversations if is_first_better else conversations[::-1]
    return split_shared_prompt(chosen, rejected, columns.warnings)


def _read_winner(columns: Columns) -> bool:
    label = columns.take_label("winner")
    winner = label.strip().lower() if isinstance(label, str) else label
    if winner in ("model_a", "model_b"):
        return bool(winner == "model_a")
    if isinstance(winner, str) and (winner.startswith("tie") or winner == "both_bad"):
        raise RowFault("TIE", "winner", ascii(label)[:80])
    detail = f"found {ascii(label)[:80]}; known are model_a, model_b"
    raise RowFault("LABEL_INVALID", "winner", detail)


def convert_arena_kaggle(columns: Columns) -> Sides:
    """The arena's Kaggle tables: turns as JSON lists of texts, and a column for each outcome."""
    is_first_better = _read_outcome(columns)
    prompts = _read_json_list(columns.take_text("prompt"), "prompt")
    conversations = []
    for name in ("response_a", "response_b"):
        answers = _read_json_list(columns.take_text(name), name)
        if len(answers) != len(prompts):
            detail = f"{len(answers)} answers to {len(prompts)} questions"
            raise RowFault("SCHEMA_MISMATCH", name, detail)
        turns = zip(prompts, answers, strict=True)
        conversations.append(
            [
                message
                for question, answer in turns
                for message in (new_message("user", question), new_assistant(answer, name))
            ]
        )
    chosen, rejected = conversations if is_first_better else conversations[::-1]
    return split_shared_prompt(chosen, rejected, columns.warnings)


def convert_arena_responses(columns: Columns) -> Sides:
    """The arena's later tables: a prompt and two responses as text, and a winner."""
    return order_answers(
        columns.take_answer("response_a"),
        columns.take_answer("response_b"),
        prompt=columns.take_question("prompt"),
        is_first_better=_read_winner(columns),
    )


def _read_outcome(columns: Columns) -> bool:
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    outcome = [read_flag(columns.take_label(name), name) for name in names]
    if sum(outcome) != 1:
        raise RowFault("LABEL_INVALID", names[0], f"{sum(outcome)} of the three outcomes are set")
    if outcome[2]:
        raise RowFault("TIE", names[2], "1")
    return bool(outcome[0])


def _read_json_list(text: str, path: str) -> list[str]:
    try:
        values = decode_strictly(text.encode())
    except RowFault as fault:
        raise RowFault("SCHEMA_MISMATCH", path, f"no JSON: {fault.finding.detail}") from None
    if not isinstance(values, list):
        raise RowFault("SCHEMA_MISMATCH", path, f"a JSON list wanted, found {ascii(values)[:80]}")
    for at, value in enumerate(values):
        if value is None:
            raise RowFault("FIELD_NULL", f"{path}.{at}", "null")
    return [read_text(value, f"{path}.{at}") for at, value in enumerate(values)]


def convert_pku_helpful(columns: Columns) -> Sides:
    """PKU-SafeRLHF by its label of helpfulness, which the safety label often contradicts."""
    return _convert_pku(columns, label="better_response_id")


def convert_pku_safe(columns: Columns) -> Sides:
    """PKU-SafeRLHF by its label of safety, which the helpfulness label often contradicts."""
    return _convert_pku(columns, label="safer_response_id")


def _convert_pku(columns: Columns, *, label: str) -> Sides:
    if as_number(columns.left.get(label)) == -1:
        raise RowFault("TIE", label, "-1")
    return order_answers(
        columns.take_answer("response_0"),
        columns.take_answer("response_1"),
        prompt=columns.take_question("prompt"),
        is_first_better=_read_choice(columns, label, first=0, second=1),
    )


def convert_alpaca_eval(columns: Columns) -> Sides:
    """AlpacaEval's annotations: a preference from 1 (the first is better) to 2 (the second is).

    Old files write a tie as 0.
    """
    preference = read_rating(columns.take("preference"), "preference")
    if preference in (0, 1.5):
        raise RowFault("TIE", "preference", f"{preference:g}")
    read_number_label(preference, "preference", low=1, high=2)
    return order_answers(
        columns.take_answer("output_1"),
        columns.take_answer("output_2"),
        prompt=columns.take_question("instruction"),
        is_first_better=preference < 1.5,
        margin=2 * abs(preference - 1.5),
    )


def convert_halos(columns: Columns) -> Sides:
    """HALOs' feedback: messages, two outputs with rewards; label 1 prefers A, 0 prefers B."""
    if as_number(columns.left.get("label")) == 0.5:
        raise RowFault("TIE", "label", "0.5")
    return order_answers(
        columns.take_answer_or_messages("output_A"),
        columns.take_answer_or_messages("output_B"),
        prompt=columns.take_question_or_messages("prompt"),
        is_first_better=_read_choice(columns, "label", first=1, second=0),
        scores=(columns.take_number("reward_A"), columns.take_number("reward_B")),
    )


def _read_choice(columns: Columns, name: str, *, first: int, second: int) -> bool:
    """Read a label with one number for each answer; return whether the first is preferred."""
    label = columns.take_label(name)
    if isinstance(label, bool) or label not in (first, second):
        detail = f"found {ascii(label)[:80]}; known are {first} and {second}"
        raise RowFault("LABEL_INVALID", name, detail)
    return bool(label == first)


def read_number_label(label: object, path: str, *, low: float, high: float) -> float:
    """Read a label that is a number on a scale."""
    if isinstance(label, bool) or not isinstance(label, int | float):
        raise RowFault("LABEL_INVALID", path, f"a number wanted, found {ascii(label)[:80]}")
    number = read_number(label, path)
    if not low <= number <= high:
        raise RowFault("LABEL_INVALID", path, f"found {number:g}; the scale is {low:g} to {high:g}")
    return number


FORMATS: tuple[Format, ...] = (
    Format(
        name="shp",
        columns={"history": is_text, "human_ref_A": is_text, "human_ref_B": is_text},
        convert=convert_shp,
    ),
    Format(
        name="helpsteer2",
        columns={"prompt": is_text, "response_1": is_text, "response_2": is_text},
        convert=convert_helpsteer2,
    ),
    Format(
        name="helpsteer3",
        columns={"context": is_text_or_messages, "response1": is_text, "response2": is_text},
        convert=convert_helpsteer3,
    ),
    Format(
        name="arena_battles",
        columns={"conversation_a": is_messages, "conversation_b": is_messages},
        convert=convert_arena,
    ),
    Format(
        name="arena_kaggle",
        columns={
            "prompt": is_text,
            "response_a": is_text,
            "response_b": is_text,
            "winner_model_a": is_cell,
        },
        convert=convert_arena_kaggle,
    ),
    Format(
        name="arena_responses",
        columns={
            "prompt": is_text,
            "response_a": is_text,
            "response_b": is_text,
            "winner": is_cell,
        },
        without=("winner_model_a",),
        convert=convert_arena_responses,
    ),
    # One layout with two labels that often disagree, so a recipe must name one of them.
    Format(
        name="pku_safe_rlhf_helpful",
        columns={"prompt": is_text, "response_0": is_text, "response_1": is_text},
        without=("response_2",),
        convert=convert_pku_helpful,
    ),
    Format(
        name="pku_safe_rlhf_safe",
        columns={"prompt": is_text, "response_0": is_text, "response_1": is_text},
        without=("response_2",),
        convert=convert_pku_safe,
    ),
    Format(
        name="alpaca_eval",
        columns={"instruction": is_text, "output_1": is_text, "output_2": is_text},
        convert=convert_alpaca_eval,
    ),
    Format(
        name="halos_feedback",
        columns={"output_A": is_text_or_messages, "output_B": is_text_or_messages},
        convert=convert_halos,
    ),
)
