"""Messages of data sets are read into the message struct."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.validate.findings import Finding, RowFault
from stages.validate.formats import FORMATS
from stages.validate.formats.row_reader import RowReader
from stages.validate.messages import read_conversation, read_message
from tests.stages.validate.formats.test_pairs import EXAMPLES
from tests.stages.validate.test_unpaired import LAYOUTS


def read(raw: object) -> tuple[dict[str, Any], list[Finding]]:
    warnings: list[Finding] = []
    return read_message(raw, "m", warnings), warnings


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("  <think>Hm.</think> Yes.", "Hm.", " Yes."),
        ("<think>\n\n</think>\n\nYes.", None, "Yes."),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("Write `<think>` and `</think>`.", None, "Write `<think>` and `</think>`."),
        ("Yes.", None, "Yes."),
    ],
)
def test_think_tags_at_the_start_become_reasoning(
    content: str, reasoning: str | None, answer: str
) -> None:
    message, warnings = read({"role": "assistant", "content": content})
    assert (message["reasoning"], message["content"], warnings) == (reasoning, answer, [])


@pytest.mark.parametrize("content", ["<think>Hm. Yes.", "Hm.</think>Yes.", "a <think> b"])
def test_a_think_tag_without_the_other_is_refused(content: str) -> None:
    with pytest.raises(RowFault) as caught:
        read({"role": "assistant", "content": content})
    assert (caught.value.finding.code, caught.value.finding.field) == (
        "REASONING_UNCLOSED",
        "m.content",
    )


def test_think_tags_of_others_than_the_assistant_are_text() -> None:
    message, _ = read({"role": "user", "content": "What does <think> do?"})
    assert message["content"] == "What does <think> do?"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_several_names(name: str) -> None:
    message, _ = read({"role": "assistant", "content": "<think> is a tag.", name: "Hm."})
    assert (message["reasoning"], message["content"]) == ("Hm.", "<think> is a tag.")


def test_sharegpt_names_and_calls_are_read() -> None:
    call = '{"name": "add", "arguments": {"b": 1, "a": 2}}'
    message, warnings = read({"from": "function_call", "value": call})
    assert (message["role"], message["content"], warnings) == ("assistant", None, [])
    assert json.loads(message["tool_calls"]) == [{"name": "add", "arguments": {"a": 2, "b": 1}}]
    result, _ = read({"from": "observation", "value": "3"})
    assert (result["role"], result["content"]) == ("tool", "3")
    with pytest.raises(RowFault) as caught:
        read({"from": "function_call", "value": "add(2, 1)"})
    assert caught.value.finding.code == "TOOLS_INVALID_JSON"


CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
OTHER = '{"name": "add", "arguments": {"a": 3, "b": 4}}'


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize(
    ("text", "reasoning", "content", "num_calls"),
    [
        (CALL, None, None, 1),
        (f"[{CALL}, {OTHER}]", None, None, 2),
        (f"<think>\nI add.\n</think>\n\n{CALL}", "I add.", None, 1),
        (f"<think>I add.</think>Let me see.\n[{CALL}, {OTHER}]", "I add.", "Let me see.", 2),
        (f"Let me add {{1}} and [2].\n{CALL}", None, "Let me add {1} and [2].", 1),
        (f'I need {{"a": 1}} first. {CALL}', None, 'I need {"a": 1} first.', 1),
        (f"<tool_call>\n{CALL}\n</tool_call>", None, None, 1),
        (f"So:\n<tool_call>{CALL}</tool_call>\n<tool_call>{OTHER}</tool_call>", None, "So:", 2),
    ],
)
def test_a_call_message_holds_calls_after_a_thought(
    role: str, text: str, reasoning: str | None, content: str | None, num_calls: int
) -> None:
    message, _ = read({"from": role, "value": text})
    assert (message["role"], message["reasoning"], message["content"]) == (
        "assistant",
        reasoning,
        content,
    )
    calls = [json.loads(CALL), json.loads(OTHER)][:num_calls]
    assert json.loads(message["tool_calls"]) == calls


@pytest.mark.parametrize(
    "text",
    ["add(2, 1)", "", '{"arguments": {}}', '{"name": "add", "arguments": {"name": "x"}', "[1, 2]"],
)
def test_a_call_message_without_a_call_is_refused(text: str) -> None:
    with pytest.raises(RowFault) as caught:
        read({"role": "tool_call", "content": text})
    assert caught.value.finding.code in ("TOOLS_INVALID_JSON", "FIELD_NULL")


def test_calls_in_a_row_are_one_turn() -> None:
    """Also after text of the assistant; a call after a result is a turn of its own."""
    talk = [
        {"role": "user", "content": "1 + 2 and 3 + 4?"},
        {"role": "assistant", "content": "I add."},
        {"role": "tool_call", "content": CALL},
        {"role": "tool_call", "content": OTHER},
        {"role": "tool_response", "content": "3"},
        {"role": "tool", "content": "7"},
        {"role": "tool_call", "content": CALL},
        {"role": "tool_response", "content": "3"},
        {"role": "assistant", "content": "3 and 7."},
    ]
    messages = read_conversation(talk, "m", [])
    roles = ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert [message["role"] for message in messages] == roles
    assert messages[1]["content"] == "I add."
    assert json.loads(messages[1]["tool_calls"]) == [json.loads(CALL), json.loads(OTHER)]
    assert (messages[4]["content"], json.loads(messages[4]["tool_calls"])) == (
        None,
        [json.loads(CALL)],
    )


def test_parts_hold_reasoning_and_calls() -> None:
    """The parts of LLaMA-Factory's v1 layout."""
    parts = [
        {"type": "reasoning", "value": "Hm."},
        {"type": "text", "value": "I add."},
        {"type": "tool_call", "value": CALL},
        {"type": "tool_call", "value": OTHER},
    ]
    message, warnings = read({"role": "assistant", "content": parts})
    assert (message["reasoning"], message["content"], warnings) == ("Hm.", "I add.", [])
    assert json.loads(message["tool_calls"]) == [json.loads(CALL), json.loads(OTHER)]
    only_call, _ = read({"role": "assistant", "content": parts[2:3]})
    assert only_call["content"] is None


def test_calls_of_the_former_api_are_read() -> None:
    call = {"name": "add", "arguments": '{"b": 1, "a": 2}'}
    message, warnings = read({"role": "assistant", "content": None, "function_call": call})
    assert message["tool_calls"] == (
        '[{"type":"function","function":{"name":"add","arguments":{"b":1,"a":2}}}]'
    )
    assert warnings == []
    message, _ = read({"role": "assistant", "content": None, "function_calls": [call]})
    assert message["tool_calls"] == '[{"name":"add","arguments":{"b":1,"a":2}}]'
    with pytest.raises(RowFault) as caught:
        read({"role": "assistant", "content": "", "function_calls": "add(b=1, a=2)"})
    assert caught.value.finding.code == "TOOLS_INVALID_JSON"


def test_parts_hold_their_text_under_two_names() -> None:
    parts = [{"type": "text", "value": "It "}, {"type": "text", "text": "is."}, " 42"]
    message, _ = read({"role": "assistant", "content": parts})
    assert message["content"] == "It is. 42"


def test_fields_that_are_not_carried_along_are_named() -> None:
    _, warnings = read({"role": "user", "content": "Q", "loss_weight": 0.0, "lang": "en"})
    assert warnings == [Finding("MESSAGE_FIELD_IGNORED", "m", "lang, loss_weight")]


COLUMN_NAMES = sorted({name for format_ in FORMATS.values() for name in format_.columns})
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "rank", "answer", "response"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


OPTIONAL_COLUMNS = (
    "history",
    "input",
    "system",
    "tools",
    "functions",
    "rejected_tools",
    "images",
    "context",
    "chat_template_kwargs",
    "weight",
    "margin",
    "status",
    "source",
)


ROWS = EXAMPLES | {name: rows[0][0] for name, rows in LAYOUTS.items()}


def convert_any(name: str, row: dict[str, Any]) -> object:
    """Return what a row becomes, its pairs or its fault."""
    reader = RowReader(format=name, pair_policy="all")
    try:
        return reader.read_unpaired(row) if reader.is_unpaired else reader.read(row)
    except RowFault as fault:
        return fault


@given(
    name=st.sampled_from(sorted(ROWS)),
    column=st.sampled_from(OPTIONAL_COLUMNS) | st.integers(0, 9),
    value=JSON_VALUES,
)
@example(name="llama_factory_alpaca", column="history", value=5)
def test_a_row_with_any_value_in_a_column_becomes_pairs_or_a_row_fault(
    name: str, column: str | int, value: object
) -> None:
    row = dict(ROWS[name])
    row[column if isinstance(column, str) else sorted(row)[column % len(row)]] = value
    assert convert_any(name, row)


@given(
    row=st.dictionaries(st.sampled_from(COLUMN_NAMES) | st.text(max_size=4), JSON_VALUES),
    format_name=st.sampled_from(sorted(FORMATS)),
)
def test_any_row_becomes_pairs_or_a_row_fault(row: dict[str, Any], format_name: str) -> None:
    assert convert_any(format_name, row)
