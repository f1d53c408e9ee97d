"""A column that can change the prompt becomes part of the pair or a code, in every layout."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.validate.findings import RowFault
from stages.validate.formats.column_map import MAP, ColumnMap
from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.formats.row_reader import RowReader
from stages.validate.part_names import PARTS
from tests.stages.validate.formats.test_pairs import EXAMPLES, PKU, assistant, user
from tests.stages.validate.running import GOOD, convert_row, jsonl, spoken, validate, write

Row = dict[str, Any]

OWN_PARTS = ("system", "history", "tools")
LAYOUTS: dict[str, Row] = {
    **{
        name: {column: value for column, value in row.items() if column not in OWN_PARTS}
        for name, row in EXAMPLES.items()
        if name != "shp"
    },
    "shp": EXAMPLES["shp"],  # Its history is the question.
    "pku_safe_rlhf_safe": PKU,
    MAP: {"q": "Tea?", "yes": "Yes, please.", "no": "No."},
}
MAPPED = ColumnMap(prompt="q", chosen="yes", rejected="no")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": None}}}]
SYSTEM = {"role": "system", "content": "Be brief."}


def convert(name: str, row: Row) -> PairDraft:
    if name == MAP:
        (draft,) = RowReader(format=MAP, column_map=MAPPED).read(row)
        return draft
    return convert_row(row, name)


def codes(draft: PairDraft) -> list[str]:
    return [warning.code for warning in draft.warnings]


def code_of(name: str, row: Row) -> str:
    with pytest.raises(RowFault) as caught:
        convert(name, row)
    return caught.value.finding.code


@pytest.mark.parametrize("name", LAYOUTS)
def test_system_text_beside_any_layout_begins_the_prompt(name: str) -> None:
    plain = convert(name, LAYOUTS[name])
    draft = convert(name, LAYOUTS[name] | {"system": "Be brief."})
    assert spoken(draft.prompt) == [("system", "Be brief."), *spoken(plain.prompt)]
    assert draft.extra == plain.extra


@pytest.mark.parametrize("column", [*PARTS["system"].names, "System Prompt", "system-prompt"])
@pytest.mark.parametrize(
    "value",
    [
        "Be brief.",
        ["Be brief."],
        SYSTEM,
        [SYSTEM],
        [{"from": "system", "value": "Be brief."}],
        [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}],
        json.dumps([SYSTEM]),
    ],
)
def test_system_column_has_several_names_and_forms(column: str, value: object) -> None:
    draft = convert_row(GOOD | {column: value}, "prompt_completion_strings")
    assert spoken(draft.prompt) == [("system", "Be brief."), ("user", GOOD["prompt"])]
    assert (draft.extra, draft.warnings) == (None, ())


@pytest.mark.parametrize(
    "value",
    [5, True, ["Be brief.", "Be kind."], [user("Be brief.")], {"text": "Be brief."}, [["x"]]],
)
def test_system_column_that_is_not_understood_has_a_code(value: object) -> None:
    draft = convert_row(GOOD | {"system": value}, "prompt_completion_strings")
    assert codes(draft) == ["PROMPT_COLUMN_UNREAD"]
    assert json.loads(draft.extra or "") == {"system": value}


@pytest.mark.parametrize(
    "value", ["", " \n", "nan", "None", None, [], {}, [""], [{**SYSTEM, "content": ""}]]
)
@pytest.mark.parametrize("name", ["messages", "prompt_completion_strings"])
def test_empty_system_column_changes_nothing(name: str, value: object) -> None:
    draft = convert(name, LAYOUTS[name] | {"system": value})
    assert draft == convert(name, LAYOUTS[name])


def test_system_column_and_the_conversations_own_must_agree() -> None:
    talk = {"chosen": [SYSTEM, user("Q"), assistant("A")]}
    talk["rejected"] = [SYSTEM, user("Q"), assistant("B")]
    draft = convert_row(talk | {"system": "Be brief."}, "implicit_prompt")
    assert spoken(draft.prompt) == [("system", "Be brief."), ("user", "Q")]
    assert code_of("implicit_prompt", talk | {"system": "Be kind."}) == "PROMPT_CONFLICT"
    two = GOOD | {"system": "Be brief.", "system_prompt": "Be kind."}
    assert code_of("prompt_completion_strings", two) == "PROMPT_CONFLICT"


EARLIER = [("user", "Hi"), ("assistant", "Hello!")]
HISTORIES = [
    [["Hi", "Hello!"]],
    [user("Hi"), assistant("Hello!")],
    [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "shp"])
@pytest.mark.parametrize("history", HISTORIES)
def test_history_beside_any_layout_stands_before_the_prompt(name: str, history: object) -> None:
    plain = convert(name, LAYOUTS[name])
    for value in (history, json.dumps(history)):
        draft = convert(name, LAYOUTS[name] | {"history": value, "system": "Be brief."})
        assert spoken(draft.prompt)[0] == ("system", "Be brief.")
        assert (
            spoken(draft.prompt)[1:]
            == [*EARLIER, *spoken(plain.prompt)][2 if spoken(plain.prompt)[:2] == EARLIER else 0 :]
        )
        assert draft.extra == plain.extra


@pytest.mark.parametrize(
    "value",
    [5, "Hi. Hello!", ["Hi", "Hello!"], [["Hi"]], [["Hi", None]], [{"user": "Hi"}], {"a": "b"}],
)
def test_history_that_is_not_understood_has_a_code(value: object) -> None:
    draft = convert_row(GOOD | {"history": value}, "prompt_completion_strings")
    assert codes(draft) == ["PROMPT_COLUMN_UNREAD"]
    assert json.loads(draft.extra or "") == {"history": value}


def test_history_that_the_prompt_repeats_counts_once() -> None:
    talk = [user("Hi"), assistant("Hello!"), user("Tea?")]
    row = LAYOUTS["messages"] | {"prompt": talk, "history": [["Hi", "Hello!"]]}
    assert spoken(convert_row(row, "messages").prompt) == spoken(talk)


def test_histories_own_system_message_comes_first() -> None:
    row = GOOD | {"history": [SYSTEM, user("Hi"), assistant("Hello!")]}
    draft = convert_row(row, "prompt_completion_strings")
    assert spoken(draft.prompt) == [("system", "Be brief."), *EARLIER, ("user", GOOD["prompt"])]
    assert code_of("prompt_completion_strings", row | {"system": "Be kind."}) == "PROMPT_CONFLICT"


@pytest.mark.parametrize("name", LAYOUTS)
def test_tools_beside_any_layout_are_kept_verbatim(name: str) -> None:
    plain = convert(name, LAYOUTS[name])
    expected = json.dumps(TOOLS, separators=(",", ":"))
    bare = [tool["function"] for tool in TOOLS]
    for more in (
        {"tools": TOOLS},
        {"tools": json.dumps(TOOLS, indent=2)},
        {"tools": [json.dumps(tool) for tool in TOOLS]},
        {"tool_definitions": TOOLS},
        {"functions": bare},
        {"functions": json.dumps(bare)},
        {"functions": TOOLS, "tools": json.dumps(TOOLS, sort_keys=True)},
        {"tools": TOOLS, "rejected_tools": json.dumps(TOOLS, sort_keys=True)},
    ):
        draft = convert(name, LAYOUTS[name] | more)
        assert (json.loads(draft.tools or ""), draft.extra) == (TOOLS, plain.extra)
    assert convert(name, LAYOUTS[name] | {"tools": TOOLS}).tools == expected
    empties: list[object] = ["[]", "", "None", [], None]
    for empty in empties:
        assert convert(name, LAYOUTS[name] | {"tools": empty}).tools is None


def test_tools_of_two_places_and_of_two_sides_must_agree() -> None:
    others = [{"name": "g"}]
    assert code_of("messages", LAYOUTS["messages"] | {"tools": TOOLS, "functions": others}) == (
        "PROMPT_CONFLICT"
    )
    for name in ("messages", "swift_messages", "swift_response", "hh_transcripts"):
        for column in ("rejected_tools", "chosen_tools"):
            row = LAYOUTS[name] | {"tools": TOOLS, column: others}
            assert code_of(name, row) == "PROMPT_MISMATCH"


def test_openai_input_has_tools_under_both_names() -> None:
    row = LAYOUTS["openai_preferences"]
    inner = {"messages": row["input"]["messages"], "tool_choice": "auto", "parallel_tool_calls": 1}
    for more in ({"tools": TOOLS}, {"functions": [TOOLS[0]["function"]]}):
        draft = convert_row(row | {"input": inner | more}, "openai_preferences")
        assert json.loads(draft.tools or "") == TOOLS
        assert json.loads(draft.extra or "") == {
            "input": {"tool_choice": "auto", "parallel_tool_calls": 1}
        }
        assert draft.warnings == ()


def test_parts_in_an_object_that_a_map_reads_from_are_found() -> None:
    data = {"q": "Tea?", "system": "Be brief.", "images": [""]}
    row: Row = {"data": data, "yes": "Y", "no": "N"}
    column_map = ColumnMap(prompt="data.q", chosen="yes", rejected="no")
    (draft,) = RowReader(format=MAP, column_map=column_map).read(row)
    assert spoken(draft.prompt) == [("system", "Be brief."), ("user", "Tea?")]
    data["images"] = ["a.png"]
    with pytest.raises(RowFault) as caught:
        RowReader(format=MAP, column_map=column_map).read(row)
    assert caught.value.finding[:2] == ("UNSUPPORTED_MODALITY", "data.images")


def test_map_names_any_column_as_system_history_or_tools() -> None:
    row = LAYOUTS[MAP] | {"who": "Be brief.", "before": [["Hi", "Hello!"]], "fns": TOOLS}
    column_map = ColumnMap(
        prompt="q", chosen="yes", rejected="no", system="who", history="before", tools="fns"
    )
    (draft,) = RowReader(format=MAP, column_map=column_map).read(row)
    assert spoken(draft.prompt) == [("system", "Be brief."), *EARLIER, ("user", "Tea?")]
    assert (json.loads(draft.tools or ""), draft.extra) == (TOOLS, None)
    with pytest.raises(RowFault) as caught:
        RowReader(format=MAP, column_map=column_map).read(row | {"system": "Be kind."})
    assert caught.value.finding.code == "PROMPT_CONFLICT"
    (draft,) = RowReader(format=MAP, column_map=column_map).read(row | {"who": 5})
    assert codes(draft) == ["PROMPT_COLUMN_UNREAD"]
    assert json.loads(draft.extra or "") == {"who": 5}


MEDIA = [
    ("images", ["a.png"]),
    ("images", [{"bytes": "iVBORw==", "path": None}]),
    ("image", {"bytes": None, "path": "a.png"}),
    ("image", "https://example.org/a.png"),
    ("Image_Path", "a.png"),
    ("image_urls", ["a.png"]),
    ("imageUrl", "https://example.org/a.png"),
    ("image_1", "a.png"),
    ("img", "a.png"),
    ("audios", ["a.wav"]),
    ("audio", {"array": None, "path": "a.wav"}),
    ("audio", {"array": [0.0, 0.5], "path": None, "sampling_rate": 16000}),
    ("image", [[[0, 255], [1, 2]]]),
    ("videos", '["a.mp4"]'),
    ("media", [{"type": "image", "url": "a.png"}]),
    ("rejected_images", ["a.png"]),
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_media_beside_any_layout_are_refused(name: str) -> None:
    for column, value in MEDIA:
        assert code_of(name, LAYOUTS[name] | {column: value}) == "UNSUPPORTED_MODALITY"


def test_media_of_a_listed_answer_are_refused() -> None:
    answers = [{"answer": "A", "rank": 1, "image": None}, {"answer": "B", "rank": 2}]
    row = {"prompt": "\n\nHuman: Q\n\nAssistant:", "answers": answers}
    column_map = ColumnMap(
        prompt="prompt",
        responses="answers",
        response="answer",
        score="rank",
        higher_is_better=False,
    )
    mapped = RowReader(format=MAP, column_map=column_map)
    assert len(mapped.read(row)) == len(RowReader(format="nectar").read(row)) == 1
    answers[0]["image"] = "a.png"
    for reader in (mapped, RowReader(format="nectar")):
        with pytest.raises(RowFault) as caught:
            reader.read(row)
        assert caught.value.finding[:2] == ("UNSUPPORTED_MODALITY", "answers.0.image")


@pytest.mark.parametrize(
    "value", [None, [], "", "[]", [None], {"bytes": None, "path": None}, "None", 0]
)
def test_empty_media_columns_and_other_columns_about_media_do_not_matter(value: object) -> None:
    more = {"images": value, "image": value, "has_image": True, "image_id": "7", "videos": value}
    draft = convert_row(GOOD | more, "prompt_completion_strings")
    assert (spoken(draft.prompt), draft.warnings) == ([("user", GOOD["prompt"])], ())


@pytest.mark.parametrize(
    "message",
    [
        {**user("Q"), "images": ["a.png"]},
        {**user("Q"), "audio": {"id": "x"}},
        {"role": "user", "content": [{"type": "text", "text": "Q", "image": "a.png"}]},
        {"role": "user", "content": [{"image": "a.png"}, {"text": "Q"}]},
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
    ],
)
def test_media_in_a_message_are_refused(message: Row) -> None:
    row = LAYOUTS["messages"] | {"prompt": [message]}
    assert code_of("messages", row) == "UNSUPPORTED_MODALITY"


def test_padding_of_text_parts_does_not_matter() -> None:
    part = {"type": "text", "text": "Q", "image": None, "image_url": None}
    row = LAYOUTS["messages"] | {"prompt": [{**user("Q"), "content": [part], "images": None}]}
    draft = convert_row(row, "messages")
    assert (spoken(draft.prompt), draft.warnings) == ([("user", "Q")], ())


@pytest.mark.parametrize("field", ["tools", "functions", "documents"])
def test_fields_of_a_message_that_belong_to_the_prompt_have_a_code(field: str) -> None:
    system = {"role": "system", "content": "Be brief.", field: [{"name": "f"}]}
    draft = convert_row(LAYOUTS["messages"] | {"prompt": [system, user("Q")]}, "messages")
    assert codes(draft) == ["PROMPT_COLUMN_UNREAD", "MESSAGE_FIELD_IGNORED"]
    assert draft.warnings[0].field == f"prompt.0.{field}"


@pytest.mark.parametrize("column", PARTS["passages"].names)
@pytest.mark.parametrize("value", ["Oslo is rainy.", [{"title": "Oslo", "text": "Rain."}]])
def test_passages_that_the_prompt_does_not_quote_have_a_code(column: str, value: Any) -> None:
    draft = convert_row(GOOD | {column: value}, "prompt_completion_strings")
    assert codes(draft) == ["PROMPT_COLUMN_UNREAD"]
    assert json.loads(draft.extra or "") == {column: value}
    quoted = GOOD | {"prompt": "Oslo is rainy.\nOslo: Rain.\nWhy?", column: value}
    draft = convert_row(quoted, "prompt_completion_strings")
    assert draft.warnings == ()
    assert json.loads(draft.extra or "") == {column: value}


def test_variables_of_a_chat_template_have_a_code() -> None:
    row = GOOD | {"chat_template_kwargs": {"enable_thinking": False}}
    assert codes(convert_row(row, "prompt_completion_strings")) == ["PROMPT_COLUMN_UNREAD"]
    empties: list[object] = [{}, {"enable_thinking": None}, "{}", None]
    for value in empties:
        draft = convert_row(GOOD | {"chat_template_kwargs": value}, "prompt_completion_strings")
        assert draft.warnings == ()


def test_level_of_an_unread_column_can_be_set(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl([GOOD | {"context": "Maths."}]))
    rejected = validate(tmp_path / "reject", file)
    assert [row["codes"] for row in rejected.rejected] == [["PROMPT_COLUMN_UNREAD"]]
    (pair,) = validate(tmp_path / "warn", file, rules={"PROMPT_COLUMN_UNREAD": "warn"}).pairs
    assert (pair["warnings"], pair["extra"]) == (["PROMPT_COLUMN_UNREAD"], '{"context":"Maths."}')


def test_bytes_of_parquet_are_refused_as_media_and_do_not_matter_elsewhere(tmp_path: Path) -> None:
    pixels = b"\x89PNG\xff"
    picture = pa.array([{"bytes": pixels, "path": None}, {"bytes": None, "path": None}])
    columns = {name: [text] * 2 for name, text in GOOD.items()}
    table = pa.table({**columns, "image": picture, "code": pa.array([pixels, b"plain"])})
    pq.write_table(table, tmp_path / "a.parquet")
    outcome = validate(tmp_path / "out", tmp_path / "a.parquet")
    (refused,), (pair,) = outcome.rejected, outcome.pairs
    assert (refused["code"], refused["field"]) == ("UNSUPPORTED_MODALITY", "image")
    assert pair["source_row"] == 1
    pq.write_table(table.select([*columns, "code"]), tmp_path / "b.parquet")
    assert len(validate(tmp_path / "other", tmp_path / "b.parquet").pairs) == 2


UNPAIRED = {
    "unpaired_completions": {"prompt": "Tea?", "completion": "Yes.", "label": True},
    "unpaired_outputs": {"prompt": "Tea?", "output": "Yes.", "label": 1},
    "unpaired_messages": {"messages": [user("Tea?"), assistant("Yes.")], "label": True},
    "unpaired_tagged_alpaca": {"instruction": "Tea?", "output": "Yes.", "kto_tag": True},
    "unpaired_tagged_turns": {
        "conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}],
        "kto_tag": True,
    },
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_rows_have_the_same_parts(name: str) -> None:
    reader = RowReader(format=name)
    more = {"system": "Be brief.", "history": [["Hi", "Hello!"]], "functions": TOOLS}
    draft = reader.read_unpaired(UNPAIRED[name] | more)
    assert spoken(draft.prompt) == [("system", "Be brief."), *EARLIER, ("user", "Tea?")]
    assert (json.loads(draft.tools or ""), draft.extra, draft.warnings) == (TOOLS, None, ())
    with pytest.raises(RowFault) as caught:
        reader.read_unpaired(UNPAIRED[name] | {"images": ["a.png"]})
    assert caught.value.finding.code == "UNSUPPORTED_MODALITY"
    (warning,) = reader.read_unpaired(UNPAIRED[name] | {"documents": ["Rain."]}).warnings
    assert warning.code == "PROMPT_COLUMN_UNREAD"


def calling(arguments: object, **more: object) -> list[Row]:
    function = {"name": "f", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function, **more}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}]


def test_calls_and_schemas_keep_keys_numbers_and_nulls_of_json(tmp_path: Path) -> None:
    """Python's own json is the oracle: what it reads and writes is what a template prints."""
    text = (
        '{"z":1.0,"a":1,"big":123456789012345678901234567890,"e":1e5,"n":null,'
        '"deep":[{"y":null,"b":-0.5}],"u":"\\u00e9"}'
    )
    printed = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    schema = f'[{{"type":"function","function":{{"name":"f","parameters":{text}}}}}]'
    call = '{"note":null,"id":"c1","function":{"name":"f","arguments":%s}}'
    line = (
        '{"prompt":[{"role":"user","content":"Q"}],"rejected":[{"role":"assistant","content":"B"}],'
        '"chosen":[{"role":"assistant","content":null,"tool_calls":[%s]}],"tools":%s}'
    )
    as_object = line % (call % text, schema)
    as_text = line % (call % json.dumps(text), json.dumps(schema))
    file = write(tmp_path / "a.jsonl", f"{as_object}\n{as_text}\n".encode())
    outcome = validate(tmp_path / "out", file)
    assert len(outcome.pairs) == 2
    for pair in outcome.pairs:
        assert pair["chosen"][0]["tool_calls"] == (
            f'[{{"note":null,"id":"c1","function":{{"name":"f","arguments":{printed}}}}}]'
        )
        assert pair["tools"] == (
            f'[{{"type":"function","function":{{"name":"f","parameters":{printed}}}}}]'
        )
    assert outcome.pairs[0]["pair_id"] == outcome.pairs[1]["pair_id"]


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_columnar_padding_goes_and_nulls_of_json_text_stay(container: str, tmp_path: Path) -> None:
    """Arrow gives every struct of a column the keys of all of them."""
    arguments = [
        {"city": "Bergen", "where": [{"lat": 1.5}, {"lon": 2.0}]},
        {"zone": "UTC", "where": []},
    ]
    tools = [
        {"name": "f", "parameters": {"city": {"type": "string"}}},
        {"name": "g", "parameters": {"zone": {"enum": ["UTC"]}}},
    ]
    texts = '{"zone":null,"city":"Oslo"}'
    table = pa.table(
        {
            "prompt": [[user("Q")]] * 3,
            "chosen": [calling(arguments[0]), calling(arguments[1], note="n"), calling({})],
            "rejected": [[assistant("B")]] * 3,
            "tools": [tools] * 3,
            "row": [0, 1, 2],
        }
    )
    as_text = pa.table(
        {
            "prompt": [[user("Q")]],
            "chosen": [calling(texts)],
            "rejected": [[assistant("B")]],
            "tools": [f'[{{"name":"f","parameters":{texts}}}]'],
        }
    )
    for name, content in (("a", table), ("b", as_text)):
        if container == "parquet":
            pq.write_table(content, tmp_path / name)
        else:
            with pa.ipc.new_file(str(tmp_path / name), content.schema) as writer:
                writer.write_table(content)
    outcome = validate(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    calls = [json.loads(pair["chosen"][0]["tool_calls"])[0] for pair in outcome.pairs]
    assert [call["function"]["arguments"] for call in calls[:3]] == [*arguments, {}]
    assert [call.get("note") for call in calls[:3]] == [None, "n", None]
    assert all(json.loads(pair["tools"]) == tools for pair in outcome.pairs[:3])
    assert json.dumps(calls[3]["function"]["arguments"], separators=(",", ":")) == texts
    assert texts in outcome.pairs[3]["tools"]


def test_rejected_rows_of_columnar_files_are_read_again_without_padding(tmp_path: Path) -> None:
    """A rejected row is kept as JSON, where a null would be data."""
    tools = [{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": 2}}]
    row = {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("A")]}
    pq.write_table(pa.Table.from_pylist([row | {"tools": tools}]), tmp_path / "a.parquet")
    first = validate(tmp_path / "first", tmp_path / "a.parquet")
    assert [row["code"] for row in first.rejected] == ["CHOSEN_EQ_REJECTED"]
    (rejected,) = (tmp_path / "first").rglob("rejected/*.parquet")
    (pair,) = validate(tmp_path / "again", rejected, rules={"CHOSEN_EQ_REJECTED": "warn"}).pairs
    assert json.loads(pair["tools"]) == tools
