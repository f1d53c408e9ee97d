"""Every known format is recognised by its content and converted to the right pair."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ConfigError
from stages.validate.findings import RowFault
from stages.validate.formats import FORMATS, recognise_format
from stages.validate.formats.row_reader import RowReader
from tests.stages.validate.running import convert_row, jsonl, spoken, validate, write

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


QUESTION = [user("Which is larger, 9.11 or 9.9?")]

EXAMPLES: dict[str, Row] = {
    "prompt_completion_strings": {
        "prompt": "The sky is",
        "chosen": " blue.",
        "rejected": " green.",
    },
    "messages": {
        "prompt": QUESTION,
        "chosen": [assistant("9.9")],
        "rejected": [assistant("9.11")],
    },
    "implicit_prompt": {
        "chosen": [*QUESTION, assistant("9.9")],
        "rejected": [*QUESTION, assistant("9.11")],
    },
    "hh_transcripts": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Tea?\n\nAssistant: Yes, please.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Tea?\n\nAssistant: No.",
    },
    "ultrafeedback_binarized": {
        "prompt": "Which is larger, 9.11 or 9.9?",
        "prompt_id": "b3a0",
        "chosen": [*QUESTION, assistant("9.9")],
        "rejected": [*QUESTION, assistant("9.11")],
        "messages": [*QUESTION, assistant("9.9")],
        "score_chosen": 8.5,
        "score_rejected": 7,
    },
    "openai_preferences": {
        "input": {"messages": QUESTION, "tools": [], "parallel_tool_calls": True},
        "preferred_output": [assistant("9.9")],
        "non_preferred_output": [assistant("9.11")],
    },
    "messages_and_texts": {
        "prompt": [user("Tea?")],
        "chosen": "Yes, please.",
        "rejected": "No.",
    },
    "argilla_records": {
        "id": "r1",
        "fields": {"prompt": "Tea?", "response-1": "No.", "response-2": "Yes, please."},
        "suggestions": {},
        "responses": {
            "ranking": [
                {
                    "user_id": "u1",
                    "value": [
                        {"rank": 1, "value": "response-2"},
                        {"rank": 2, "value": "response-1"},
                    ],
                }
            ]
        },
        "status": "completed",
    },
    "rejected_list": {"prompt": "Tea?", "chosen": "Yes, please.", "rejected": ["No."]},
    "stack_exchange": {
        "qid": 7,
        "question": "Tea?",
        "response_j": "Yes, please.",
        "response_k": "No.",
    },
    "llama_factory_outputs": {
        "instruction": "Answer.",
        "input": "Tea?",
        "output": ["Yes, please.", "No."],
    },
    "ultra_interact": {
        "task": "Drinks",
        "trajectory": [{"from": "user", "value": "Tea?"}],
        "chosen": "Yes, please.",
        "rejected": "No.",
    },
    "arena_responses": {
        "id": "a1",
        "prompt": "Tea?",
        "response_a": "No.",
        "response_b": "Yes, please.",
        "winner": "model_b",
        "model_a": "vicuna",
        "model_b": "koala",
    },
    "distilabel_generations": {
        "instruction": "Tea?",
        "generations": ["No.", "Hm.", "Yes, please."],
        "generation_models": ["a", "b", "c"],
        "ratings": [1, 3, 5],
        "rationales": ["", "", ""],
    },
    "distilabel_ratings": {
        "input": "Tea?",
        "generation_model": ["a", "b"],
        "generations": ["No.", "Yes, please."],
        "rating": [1.0, 4.0],
    },
    "preferred_dispreferred": {
        "prompt": "Tea?",
        "preferred": "Yes, please.",
        "dispreferred": "No.",
    },
    "question_system": {
        "system": "You are a waiter.",
        "question": "Tea?",
        "chosen": "Yes, please.",
        "rejected": "No.",
    },
    "openai_completions": {
        "input": {"messages": QUESTION},
        "preferred_completion": [assistant("9.9")],
        "non_preferred_completion": [assistant("9.11")],
    },
    "distilabel_orca": {
        "system": "",
        "input": "Tea?",
        "chosen": "Yes, please.",
        "rejected": "No.",
        "rating": [9, 7],
        "status": "swapped",
        "original_chosen": "No.",
    },
    "argilla_responses": {
        "source": "evol_instruct",
        "instruction": "Tea?",
        "chosen_response": "Yes, please.",
        "rejected_response": "No.",
        "chosen_avg_rating": 4.5,
        "rejected_avg_rating": 3.0,
        "chosen_model": "gpt-4",
    },
    "swift_response": {
        "messages": [user("Tea?"), assistant("Yes, please.")],
        "rejected_response": "No.",
    },
    "swift_messages": {
        "messages": [user("Tea?"), assistant("Yes, please.")],
        "rejected_messages": [user("Tea?"), assistant("No.")],
    },
    "llama_factory_alpaca": {
        "instruction": "Answer.",
        "input": "Tea?",
        "chosen": "Yes, please.",
        "rejected": "No.",
        "system": "You are a waiter.",
        "history": [["Hi", "Hello!"]],
    },
    "llama_factory_sharegpt": {
        "conversations": [{"from": "human", "value": "Tea?"}],
        "chosen": {"from": "gpt", "value": "Yes, please."},
        "rejected": {"from": "gpt", "value": "No."},
        "system": "You are a waiter.",
        "tools": "",
    },
    "llama_factory_v1": {
        "chosen_messages": [
            {"role": "user", "content": [{"type": "text", "value": "Tea?"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "Yes, please."}]},
        ],
        "rejected_messages": [
            {"role": "user", "content": [{"type": "text", "value": "Tea?"}]},
            {"role": "assistant", "content": [{"type": "text", "value": "No."}]},
        ],
    },
    "axolotl_chat": {
        "messages": [user("Tea?")],
        "chosen": assistant("Yes, please."),
        "rejected": assistant("No."),
    },
    "shp": {
        "post_id": "q1",
        "domain": "askculinary_train",
        "history": "Tea?",
        "human_ref_A": "No.",
        "human_ref_B": "Yes, please.",
        "labels": 0,
        "score_A": 13,
        "score_B": 52,
        "score_ratio": 4.0,
    },
    "helpsteer2": {
        "split": "train",
        "prompt": "Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nTea?",
        "response_1": "Yes, please.",
        "response_2": "No.",
        "preference_strength": -2,
    },
    "helpsteer3": {
        "domain": "general",
        "context": [user("Tea?")],
        "response1": "No.",
        "response2": "Yes, please.",
        "overall_preference": 1,
        "individual_preference": [{"score": 1}],
    },
    "arena_battles": {
        "question_id": "58210e39",
        "model_a": "vicuna",
        "model_b": "koala",
        "winner": "model_b",
        "conversation_a": [user("Tea?"), assistant("No.")],
        "conversation_b": [user("Tea?"), assistant("Yes, please.")],
        "turn": 1,
    },
    "arena_kaggle": {
        "id": 30192,
        "prompt": '["Tea?"]',
        "response_a": '["Yes, please."]',
        "response_b": '["No."]',
        "winner_model_a": 1,
        "winner_model_b": 0,
        "winner_tie": 0,
    },
    "alpaca_eval": {
        "instruction": "Tea?",
        "output_1": "No.",
        "output_2": "Yes, please.",
        "generator_1": "davinci",
        "preference": 1.73,
    },
    "halos_feedback": {
        "type": "pairwise_feedback",
        "prompt": [user("Tea?")],
        "output_A": [assistant("Yes, please.")],
        "output_B": [assistant("No.")],
        "reward_A": 1.2,
        "reward_B": 0.1,
        "label": 1,
    },
    "ultrafeedback_raw": {
        "source": "sharegpt",
        "instruction": "Tea?",
        "models": ["a", "b", "c"],
        "completions": [
            {"response": "Hm.", "annotations": {"helpfulness": {"Rating": "3"}}},
            {
                "response": "Yes, please.",
                "annotations": {"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "4"}},
                "overall_score": 1.0,
            },
            {"response": "No.", "annotations": {"helpfulness": {"Rating": "1"}}},
        ],
    },
    "nectar": {
        "prompt": "\n\nHuman: Tea? \n\nAssistant: ",
        "answers": [
            {"answer": "Hm.", "model": "x", "rank": 2.0},
            {"answer": "No.", "model": "y", "rank": 3.0},
            {"answer": "Yes, please.", "model": "z", "rank": 1.0},
        ],
        "turns": 1,
        "num_responses": 3,
        "source": ["sharegpt"],
    },
    "nemo_completions": {
        "context": [user("Tea?")],
        "completions": [
            {"rank": 1, "completion": [assistant("No.")]},
            {"rank": 0, "completion": [assistant("Yes, please.")]},
        ],
        "task_name": "drinks",
    },
}
PKU = {
    "prompt": "Tea?",
    "response_0": "No.",
    "response_1": "Yes, please.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
"""One layout with two labels: a recipe must name one of two formats."""
PKU_FORMATS = {"pku_safe_rlhf_helpful", "pku_safe_rlhf_safe"}

# Derived by reading each example, not by running the code.
MEANINGS: dict[str, tuple[list[tuple[str, str]], str, str]] = {
    "prompt_completion_strings": ([("user", "The sky is")], " blue.", " green."),
    "messages": ([("user", "Which is larger, 9.11 or 9.9?")], "9.9", "9.11"),
    "implicit_prompt": ([("user", "Which is larger, 9.11 or 9.9?")], "9.9", "9.11"),
    "hh_transcripts": (
        [("user", "Hi"), ("assistant", "Hello!"), ("user", "Tea?")],
        "Yes, please.",
        "No.",
    ),
    "ultrafeedback_binarized": ([("user", "Which is larger, 9.11 or 9.9?")], "9.9", "9.11"),
    "openai_preferences": ([("user", "Which is larger, 9.11 or 9.9?")], "9.9", "9.11"),
    "preferred_dispreferred": ([("user", "Tea?")], "Yes, please.", "No."),
    "messages_and_texts": ([("user", "Tea?")], "Yes, please.", "No."),
    "argilla_records": ([("user", "Tea?")], "Yes, please.", "No."),
    "rejected_list": ([("user", "Tea?")], "Yes, please.", "No."),
    "stack_exchange": ([("user", "Tea?")], "Yes, please.", "No."),
    "llama_factory_outputs": ([("user", "Answer.\nTea?")], "Yes, please.", "No."),
    "ultra_interact": ([("user", "Tea?")], "Yes, please.", "No."),
    "arena_responses": ([("user", "Tea?")], "Yes, please.", "No."),
    "distilabel_generations": ([("user", "Tea?")], "Yes, please.", "No."),
    "distilabel_ratings": ([("user", "Tea?")], "Yes, please.", "No."),
    "question_system": (
        [("system", "You are a waiter."), ("user", "Tea?")],
        "Yes, please.",
        "No.",
    ),
    "distilabel_orca": ([("user", "Tea?")], "Yes, please.", "No."),
    "argilla_responses": ([("user", "Tea?")], "Yes, please.", "No."),
    "swift_response": ([("user", "Tea?")], "Yes, please.", "No."),
    "swift_messages": ([("user", "Tea?")], "Yes, please.", "No."),
    "llama_factory_v1": ([("user", "Tea?")], "Yes, please.", "No."),
    "axolotl_chat": ([("user", "Tea?")], "Yes, please.", "No."),
    "shp": ([("user", "Tea?")], "Yes, please.", "No."),
    "helpsteer3": ([("user", "Tea?")], "Yes, please.", "No."),
    "arena_battles": ([("user", "Tea?")], "Yes, please.", "No."),
    "arena_kaggle": ([("user", "Tea?")], "Yes, please.", "No."),
    "alpaca_eval": ([("user", "Tea?")], "Yes, please.", "No."),
    "halos_feedback": ([("user", "Tea?")], "Yes, please.", "No."),
    "ultrafeedback_raw": ([("user", "Tea?")], "Yes, please.", "No."),
    "nectar": ([("user", "Tea?")], "Yes, please.", "No."),
    "nemo_completions": ([("user", "Tea?")], "Yes, please.", "No."),
    "openai_completions": ([("user", "Which is larger, 9.11 or 9.9?")], "9.9", "9.11"),
    "llama_factory_sharegpt": (
        [("system", "You are a waiter."), ("user", "Tea?")],
        "Yes, please.",
        "No.",
    ),
    "helpsteer2": (
        [("user", "Hi"), ("assistant", "Hello!"), ("user", "Tea?")],
        "Yes, please.",
        "No.",
    ),
    "llama_factory_alpaca": (
        [
            ("system", "You are a waiter."),
            ("user", "Hi"),
            ("assistant", "Hello!"),
            ("user", "Answer.\nTea?"),
        ],
        "Yes, please.",
        "No.",
    ),
}


SIDES = {
    "chosen": "rejected",
    "preferred": "dispreferred",
    "preferred_output": "non_preferred_output",
    "preferred_completion": "non_preferred_completion",
    "chosen_response": "rejected_response",
    "messages": "rejected_messages",
    "chosen_messages": "rejected_messages",
}
SIDED = [
    name
    for name, row in EXAMPLES.items()
    if any({a, b} <= set(row) for a, b in SIDES.items()) and name != "rejected_list"
]
"""Formats with a column for each side, both of one kind."""


def test_every_format_has_an_example() -> None:
    unpaired = {name for name, format_ in FORMATS.items() if format_.is_unpaired}
    assert set(EXAMPLES) == set(MEANINGS) == set(FORMATS) - PKU_FORMATS - unpaired


@pytest.mark.parametrize("name", EXAMPLES)
def test_format_is_recognised_and_means_what_it_says(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", jsonl([EXAMPLES[name]]))
    outcome = validate(tmp_path / "out", file)
    assert outcome.summary["formats"] == {file.as_posix(): name}
    prompt, chosen, rejected = MEANINGS[name]
    (pair,) = outcome.pairs
    assert spoken(pair["prompt"]) == prompt
    assert spoken(pair["chosen"]) == [("assistant", chosen)]
    assert spoken(pair["rejected"]) == [("assistant", rejected)]
    assert pair["warnings"] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_other_format_takes_a_row_for_its_own(name: str) -> None:
    assert [other for other in FORMATS if FORMATS[other].matches(EXAMPLES[name])] == [name]


def test_two_labels_of_one_layout_are_not_guessed(tmp_path: Path) -> None:
    """The more helpful answer is the less safe one, so the two formats give opposite pairs."""
    file = write(tmp_path / "pku.jsonl", jsonl([PKU]))
    with pytest.raises(ConfigError, match="pku_safe_rlhf_helpful 100%, pku_safe_rlhf_safe 100%"):
        validate(tmp_path / "auto", file)
    for name, answer in {"helpful": "Yes, please.", "safe": "No."}.items():
        (pair,) = validate(tmp_path / name, file, format=f"pku_safe_rlhf_{name}").pairs
        assert spoken(pair["chosen"]) == [("assistant", answer)]


@pytest.mark.parametrize("name", SIDED)
def test_swapping_the_sides_swaps_the_answers_and_nothing_else(name: str) -> None:
    row = {k: v for k, v in EXAMPLES[name].items() if "score" not in k and "rating" not in k}
    if name == "ultrafeedback_binarized":
        del row["messages"]
    swapped = dict(row)
    for one, other in SIDES.items():
        if {one, other} <= set(row):
            swapped[one], swapped[other] = row[other], row[one]
    before, after = convert_row(row, name), convert_row(swapped, name)
    assert (after.prompt, after.chosen, after.rejected) == (
        before.prompt,
        before.rejected,
        before.chosen,
    )
    assert before.chosen != before.rejected


@pytest.mark.parametrize(
    ("rejected", "answers"),
    [
        ("Hm.", [["Hm."]]),
        (assistant("Hm."), [["Hm."]]),
        ([assistant("Hm.")], [["Hm."]]),
        (["Hm.", "No."], [["Hm."], ["No."]]),
        ([assistant("Hm."), "No."], [["Hm."], ["No."]]),
        ([[assistant("Hm.")], [assistant("No.")]], [["Hm."], ["No."]]),
        ([user("Tea?"), assistant("Hm.")], [["Hm."]]),
        (json.dumps([assistant("Hm.")]), [["Hm."]]),
    ],
)
def test_swift_rejects_one_answer_or_several(rejected: object, answers: list[list[str]]) -> None:
    row = EXAMPLES["swift_response"] | {"rejected_response": rejected}
    assert recognise_format([row], file="a.jsonl") == "swift_response"
    drafts = RowReader(format="swift_response").read(row)
    assert [[m["content"] for m in draft.rejected] for draft in drafts] == answers
    for draft in drafts:
        assert spoken([*draft.prompt, *draft.chosen]) == [
            ("user", "Tea?"),
            ("assistant", "Yes, please."),
        ]
        assert draft.weight == 1.0


@pytest.mark.parametrize(
    ("name", "column"), [("rejected_list", "rejected"), ("swift_response", "rejected_response")]
)
def test_an_empty_list_of_rejected_answers_is_an_empty_answer(
    name: str, column: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([EXAMPLES[name] | {column: []}]))
    outcome = validate(tmp_path / "out", file, format=name)
    assert [row["code"] for row in outcome.rejected] == ["REJECTED_EMPTY"]


@pytest.mark.parametrize("name", ["swift_response", "swift_messages"])
def test_swift_places_in_pictures_are_refused(name: str) -> None:
    objects = {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}
    with pytest.raises(RowFault) as caught:
        convert_row(EXAMPLES[name] | {"objects": objects}, name)
    assert caught.value.finding[:2] == ("UNSUPPORTED_MODALITY", "objects")
    convert_row(EXAMPLES[name] | {"objects": {"ref": [], "bbox": []}}, name)


def test_each_of_several_rejected_answers_gives_a_pair(tmp_path: Path) -> None:
    row = EXAMPLES["rejected_list"] | {"rejected": ["No.", [assistant("Hm.")], "Never."]}
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl([row])))
    assert [pair["rejected"][0]["content"] for pair in outcome.pairs] == ["No.", "Hm.", "Never."]
    assert {pair["chosen"][0]["content"] for pair in outcome.pairs} == {"Yes, please."}
    assert (outcome.counts.num_in, outcome.counts.num_rows_kept) == (1, 1)


def test_swift_text_replaces_the_last_answer_and_messages_all_since_the_question() -> None:
    """The question, a call and its result and the answer; the last rejected answer calls, too."""
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    result = {"role": "tool_response", "content": "42"}
    row = {"messages": [*QUESTION, call, result, assistant("It is 42.")]}
    lengths = []
    for rejected in ("No.", [assistant("No.")], [call, result, assistant("No.")]):
        draft = convert_row(row | {"rejected_response": rejected}, "swift_response")
        lengths.append((len(draft.prompt), len(draft.chosen), len(draft.rejected)))
    assert lengths == [(3, 1, 1), (3, 1, 1), (1, 3, 3)]


def test_swift_row_with_two_rejected_sides_is_refused() -> None:
    row = EXAMPLES["swift_messages"] | {"rejected_response": "Hm."}
    with pytest.raises(RowFault) as caught:
        convert_row(row, "swift_messages")
    assert caught.value.finding[:2] == ("SCHEMA_MISMATCH", "rejected_response")


def test_ultrafeedback_keeps_scores_and_id_and_drops_the_copy_of_the_chosen_side() -> None:
    draft = convert_row(EXAMPLES["ultrafeedback_binarized"], "ultrafeedback_binarized")
    assert (draft.score_chosen, draft.score_rejected, draft.margin) == (8.5, 7.0, 1.5)
    assert (draft.source_id, draft.extra) == ("b3a0", None)


def test_ultrafeedback_prompt_may_repeat_the_last_question() -> None:
    talk = [user("Hi"), assistant("Hello!"), user("Tea?")]
    row = {
        "prompt": "Tea?",
        "chosen": [*talk, assistant("Yes")],
        "rejected": [*talk, assistant("No")],
    }
    draft = convert_row(row, "ultrafeedback_binarized")
    assert spoken(draft.prompt) == [("user", "Hi"), ("assistant", "Hello!"), ("user", "Tea?")]
    assert draft.warnings == ()


def test_ultrafeedback_prompt_is_the_question_where_sides_are_only_answers() -> None:
    row = {"prompt": "Tea?", "chosen": [assistant("Yes")], "rejected": [assistant("No")]}
    draft = convert_row(row, "ultrafeedback_binarized")
    assert spoken(draft.prompt) == [("user", "Tea?")]


def test_openai_input_that_is_not_mapped_is_kept_in_extra() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}]
    row = EXAMPLES["openai_preferences"] | {
        "input": {"messages": QUESTION, "tools": tools, "parallel_tool_calls": True}
    }
    draft = convert_row(row, "openai_preferences")
    assert draft.extra is not None
    assert json.loads(draft.extra) == {"input": {"parallel_tool_calls": True}}
    assert draft.tools is not None
    assert json.loads(draft.tools) == tools
    assert draft.tools.index('"b":1') < draft.tools.index('"a":2')


def test_preferred_dispreferred_takes_messages_too() -> None:
    row = {"prompt": QUESTION, "preferred": [assistant("9.9")], "dispreferred": "9.11"}
    draft = convert_row(row, "preferred_dispreferred")
    assert spoken([*draft.prompt, *draft.chosen, *draft.rejected]) == [
        ("user", "Which is larger, 9.11 or 9.9?"),
        ("assistant", "9.9"),
        ("assistant", "9.11"),
    ]


@pytest.mark.parametrize("system", ["", "  ", None])
def test_empty_system_text_makes_no_message(system: str | None) -> None:
    draft = convert_row(EXAMPLES["question_system"] | {"system": system}, "question_system")
    assert spoken(draft.prompt) == [("user", "Tea?")]


def test_common_prompt_ends_where_the_assistant_begins_to_differ() -> None:
    """A tool result that both sides share belongs to the prompt, all others to the answers."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    result = {"role": "tool", "content": "42"}
    same = {
        "chosen": [*QUESTION, call, result, assistant("42")],
        "rejected": [*QUESTION, call, result, assistant("43")],
    }
    assert len(convert_row(same, "implicit_prompt").prompt) == 3
    other = {**result, "content": "41"}
    different = {**same, "rejected": [*QUESTION, call, other, assistant("43")]}
    draft = convert_row(different, "implicit_prompt")
    assert (len(draft.prompt), len(draft.chosen), len(draft.rejected)) == (1, 3, 3)
    more_results = {**same, "rejected": [*QUESTION, call, result, other, assistant("43")]}
    draft = convert_row(more_results, "implicit_prompt")
    assert (len(draft.prompt), len(draft.chosen), len(draft.rejected)) == (1, 3, 4)


def test_shared_calls_may_differ_in_the_order_of_keys() -> None:
    """Then they are the same call, and the chosen side's spelling is used."""
    sides = {}
    for side, arguments in (("chosen", {"b": 1, "a": 2}), ("rejected", {"a": 2, "b": 1})):
        call = {"name": "f", "arguments": arguments}
        talk = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        sides[side] = [*QUESTION, *talk, {"role": "tool", "content": "42"}, assistant(side)]
    draft = convert_row(sides, "implicit_prompt")
    assert (len(draft.prompt), spoken(draft.rejected)) == (3, [("assistant", "rejected")])
    assert draft.prompt[1]["tool_calls"] == '[{"name":"f","arguments":{"b":1,"a":2}}]'
    assert [warning.code for warning in draft.warnings] == ["PROMPT_MISMATCH_WS"]


def test_equal_conversations_leave_one_answer_a_side() -> None:
    talk = [*QUESTION, assistant("9.9")]
    draft = convert_row({"chosen": talk, "rejected": talk}, "implicit_prompt")
    assert spoken(draft.prompt) == spoken(QUESTION)
    assert draft.chosen == draft.rejected


@pytest.mark.parametrize(
    ("alias", "role"),
    [
        ("human", "user"),
        ("prompter", "user"),
        ("User ", "user"),
        ("developer", "system"),
        ("observation", "tool"),
        ("ipython", "tool"),
        ("function", "tool"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("chatgpt", "assistant"),
        ("Assistant ", "assistant"),
    ],
)
def test_roles_have_other_names(alias: str, role: str) -> None:
    row = EXAMPLES["messages"] | {"prompt": [{"role": alias, "content": "x"}]}
    assert convert_row(row, "messages").prompt[0]["role"] == role


def test_message_keeps_reasoning_tool_calls_and_names() -> None:
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b":1,"a":2}'}}
    ]
    chosen = [
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "Hm."},
        {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": [{"type": "text", "text": "It "}, {"text": "is 42."}]},
    ]
    draft = convert_row(EXAMPLES["messages"] | {"chosen": chosen}, "messages")
    call, result, answer = draft.chosen
    assert call["content"] is None
    assert call["reasoning"] == "Hm."
    function = {"arguments": {"a": 2, "b": 1}, "name": "f"}
    assert json.loads(call["tool_calls"]) == [
        {"function": function, "id": "c1", "type": "function"}
    ]
    assert (result["tool_call_id"], result["name"]) == ("c1", "f")
    assert answer["content"] == "It is 42."
    assert draft.warnings == ()


def test_columns_without_a_place_are_kept_in_extra() -> None:
    row = EXAMPLES["prompt_completion_strings"] | {
        "lang": "en",
        "id": 10**29 + 1,
        "dataset": "mine",
        "nothing": None,
        "chosen_rating": 4,
        "rejected_rating": None,
        "margin": 0.5,
        "weight": 2,
    }
    draft = convert_row(row, "prompt_completion_strings")
    assert draft.extra == '{"lang":"en"}'
    assert draft.source_id == "100000000000000000000000000001"
    assert draft.source == "mine"
    assert (draft.score_chosen, draft.score_rejected, draft.margin) == (4.0, None, 0.5)
    assert draft.weight == 2.0


@pytest.mark.parametrize(
    ("name", "measured", "margin"),
    [
        ("prompt_completion_strings", {"score_chosen": 4, "score_rejected": 1}, 3.0),
        ("alpaca_eval", {"preference": 2}, 1.0),  # 2 * |2 - 1.5|
    ],
)
def test_a_margin_that_is_not_the_one_used_is_kept_in_extra(
    name: str, measured: dict[str, float], margin: float
) -> None:
    """The difference of the scores or the label's margin takes precedence over the row's column."""
    row = EXAMPLES[name] | measured
    without, same, other = (
        convert_row(row | more, name) for more in ({}, {"margin": margin}, {"margin": 7})
    )
    assert (without.margin, same.margin, other.margin) == (margin, margin, margin)
    assert same.extra == without.extra
    assert json.loads(other.extra or "") == {**json.loads(without.extra or "{}"), "margin": 7}


def test_row_of_another_format_than_its_file_is_a_mismatch() -> None:
    with pytest.raises(RowFault) as caught:
        convert_row(EXAMPLES["messages"], "prompt_completion_strings")
    assert caught.value.finding.code == "SCHEMA_MISMATCH"
    assert "looks like messages" in caught.value.finding.detail


def test_a_few_rows_of_other_formats_do_not_hide_the_format() -> None:
    rows = [EXAMPLES["messages"]] * 9 + [EXAMPLES["implicit_prompt"]] + [{"chosen": 1}] * 5
    assert recognise_format(rows, file="a.jsonl") == "messages"


@pytest.mark.parametrize("cell", [None, ""])
def test_empty_cells_do_not_hide_the_format(cell: str | None, tmp_path: Path) -> None:
    """Two of three rows lack an answer; they are rejected, and the third one tells the layout."""
    whole = EXAMPLES["ultrafeedback_binarized"]
    rows = [whole | {"chosen": cell}, whole, whole | {"rejected": cell}]
    outcome = validate(tmp_path / "out", write(tmp_path / "a.jsonl", jsonl(rows)))
    assert list(outcome.summary["formats"].values()) == ["ultrafeedback_binarized"]
    assert [pair["source_row"] for pair in outcome.pairs] == [1]
    assert len(outcome.rejected) == 2


def test_rows_without_any_cell_of_a_format_are_not_counted_for_it() -> None:
    rows = [EXAMPLES["messages"]] + [{"prompt": None, "chosen": None, "rejected": None}] * 2
    with pytest.raises(ConfigError, match="messages 33%"):
        recognise_format(rows, file="a.jsonl")


def test_mixed_file_is_refused_with_shares_and_the_line_to_write() -> None:
    rows = [EXAMPLES["messages"]] * 6 + [EXAMPLES["prompt_completion_strings"]] * 4
    with pytest.raises(ConfigError) as caught:
        recognise_format(rows, file="mix.jsonl")
    message = str(caught.value)
    assert "mix.jsonl" in message
    assert "messages 60%, prompt_completion_strings 40%" in message
    assert "{path: mix.jsonl, format: messages}" in message


def test_row_that_fits_two_formats_is_refused() -> None:
    row = EXAMPLES["prompt_completion_strings"] | {"preferred": "a", "dispreferred": "b"}
    with pytest.raises(ConfigError, match="preferred_dispreferred 100%"):
        recognise_format([row], file="both.jsonl")


def test_unknown_format_is_refused_with_its_columns() -> None:
    row = {"task": "Q", "winning": "A", "losing": "B"}
    with pytest.raises(ConfigError, match="Columns found: task, winning, losing"):
        recognise_format([row], file="alpaca.jsonl")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "Q", "completion": "A"},
            "unpaired_completions (prompt, completion, label): there is no label",
        ),
        (
            {"prompt": "Q", "chosen": [assistant("A")], "rejected": "B"},
            "ultrafeedback_binarized (prompt, chosen, rejected): rejected is text",
        ),
        (
            {
                "messages": [user("Q")],
                "chosen": "A",
                "rejected": "B",
                "prompt": "P",
                "input": "R",
            },
            "axolotl_chat (messages, chosen, rejected): prompt is there, too, input is there, too",
        ),
    ],
)
def test_message_says_what_the_nearest_formats_lack(row: Row, said: str) -> None:
    rows = [row, EXAMPLES["shp"]]
    with pytest.raises(ConfigError) as caught:
        recognise_format(rows, file="a.jsonl")
    assert f"  {said}" in str(caught.value)


def test_continuations_without_a_prompt_are_not_guessed() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    with pytest.raises(ConfigError, match="no single format"):
        recognise_format([row], file="a.jsonl")


def test_named_format_is_not_guessed(tmp_path: Path) -> None:
    """Half of the rows fit each format: auto refuses the file, a named format reads it."""
    rows = [EXAMPLES["messages"], EXAMPLES["implicit_prompt"]]
    file = write(tmp_path / "mix.jsonl", jsonl(rows))
    with pytest.raises(ConfigError):
        validate(tmp_path / "auto", file)
    outcome = validate(tmp_path / "named", file, format="implicit_prompt")
    assert [pair["source_row"] for pair in outcome.pairs] == [1]
    assert [row["code"] for row in outcome.rejected] == ["SCHEMA_MISMATCH"]
