"""Templates get the messages, variables and date that they read; what they raise is a code."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from schemas.config import dump_config, parse_config
from schemas.errors import ConfigError
from stages.encode.config import EncodeConfig
from stages.encode.encoder import Encoder
from stages.encode.template import RowRejected
from tests.stages.encode.templates import HYBRID, OPENED, STRIPPED
from tests.stages_rows import message, pair_row
from tests.tiny_models import CHATML

CALLS = json.dumps(
    [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Åre"}},
        }
    ],
    ensure_ascii=False,
)
CALLED = [
    message("user", "Cold?"),
    message("assistant", None, tool_calls=CALLS),
    message("tool", "3", tool_call_id="c1"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def encode(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str, **config: Any
) -> tuple[str, str, list[str]]:
    """Return the decoded prompt, the decoded chosen side, and the warnings."""
    encoded, warnings = Encoder(
        tokenizer, template, EncodeConfig(max_length=4096, max_prompt_length=2048, **config)
    ).encode_pair(row)
    prompt, chosen = (tokenizer.decode(encoded[f"{part}_ids"]) for part in ("prompt", "chosen"))
    return prompt, chosen, warnings


def reject(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str, **config: Any
) -> tuple[str, str, str]:
    with pytest.raises(RowRejected) as caught:
        encode(tokenizer, row, template, **config)
    code, field, detail = caught.value.args
    return code, field, detail


def turns(call: str, content: str = "m.content") -> str:
    """Return a template that writes calls as given, or else the content."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}"
        "{% for c in m.tool_calls %}" + call + "{% endfor %}"
        "{% else %}{{ " + content + " }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize(
    "call",
    [
        "{{ c.function.name + c.function.arguments }}",
        "{{ c.function.name ~ c.function.arguments }}",
        "{{ c.function.name }}{{ c.function.arguments }}",
        "{{ c.function.name }}{{ c.function.arguments | tojson }}",
        "{{ c['function']['name'] + (c['function']['arguments'] | string) }}",
        "{{ c.function.name }}{% if c.function.arguments is string %}!{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}",
    ],
)
@pytest.mark.parametrize("is_text", [False, True])
def test_arguments_reach_every_template_as_json(
    tokenizer: PreTrainedTokenizerBase, call: str, is_text: bool
) -> None:
    calls = json.loads(CALLS)
    if is_text:
        calls[0]["function"]["arguments"] = '{"city": "Åre"}'
    asked = [CALLED[0], {**CALLED[1], "tool_calls": json.dumps(calls)}, CALLED[2]]
    prompt, _, _ = encode(tokenizer, pair_row(asked, "Yes.", "No."), turns(call))
    assert 'assistant\nweather{"city": "Åre"}<|im_end|>' in prompt


def test_arguments_can_be_walked_through(tokenizer: PreTrainedTokenizerBase) -> None:
    call = (
        "{{ c.function.name }}{% for key, value in c.function.arguments.items() %}"
        "{{ key }}={{ value }}{% endfor %}"
    )
    prompt, _, _ = encode(tokenizer, pair_row(CALLED, "Yes.", "No."), turns(call))
    assert "weathercity=Åre<|im_end|>" in prompt


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    "test",
    ["m.content is none", "m.content is undefined", "m.content == ''", "not (m.content + '')"],
)
def test_a_call_without_text_is_rendered_however_a_template_asks_for_it(
    tokenizer: PreTrainedTokenizerBase, content: str | None, test: str
) -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls and " + test + " %}"
        "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}<|im_end|>"
        "{% endfor %}"
    )
    asked = [CALLED[0], {**CALLED[1], "content": content}, CALLED[2]]
    prompt, _, _ = encode(tokenizer, pair_row(asked, "Yes.", "No."), template)
    assert prompt == "Cold?<|im_end|>weather<|im_end|>3<|im_end|>"


def test_a_call_without_its_wrapping_is_wrapped_where_a_template_needs_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    bare = json.dumps([{"name": "weather", "arguments": {"city": "Rome"}}])
    asked = [CALLED[0], {**CALLED[1], "tool_calls": bare}, CALLED[2]]
    call = "{{ c['type'] + c.function.name }}"
    prompt, _, _ = encode(tokenizer, pair_row(asked, "Yes.", "No."), turns(call))
    assert "functionweather" in prompt


@pytest.mark.parametrize("side", ["prompt", "chosen"])
def test_a_lost_call_is_rejected(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    first_only = turns("{% if loop.first %}{{ c.function.name }}{% endif %}")
    two = json.dumps([*json.loads(CALLS), {**json.loads(CALLS)[0], "id": "c2"}])
    call = message("assistant", None, tool_calls=two)
    row = pair_row([CALLED[0], call, CALLED[2]], "Yes.", "No.")
    if side == "chosen":
        row = pair_row("Cold?", [call], "No.")
    code, field, detail = reject(tokenizer, row, first_only)
    assert (code, field) == ("TOOL_CALL_LOST", side)
    assert "'weather'" in detail


def test_a_lost_call_beside_a_text_is_warned_of(tokenizer: PreTrainedTokenizerBase) -> None:
    call = message("assistant", "Let me look.", tool_calls=CALLS)
    row = pair_row("Cold?", [call], "No.")
    for template in (CHATML, "none"):
        assert "TOOL_CALLS_NOT_RENDERED" in encode(tokenizer, row, template)[2]
    assert encode(tokenizer, row, turns("{{ c.function.name }}"))[2] == []


def test_tools_that_a_template_leaves_out_are_warned_of(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tools = '[{"type": "function", "function": {"name": "weather"}}]'
    row = pair_row("Cold?", "Yes.", "No.", tools=tools)
    prints = "{{ tools | tojson if tools }}" + turns("")
    assert "TOOLS_NOT_RENDERED" not in encode(tokenizer, row, prints)[2]
    assert "TOOLS_NOT_RENDERED" in encode(tokenizer, row, turns(""))[2]
    assert "TOOLS_NOT_RENDERED" in encode(tokenizer, row, "none")[2]


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("m.content + 1", "TypeError"),
        ("m.content.absent.more", "UndefinedError"),
        ("m.content.format_map({})", "KeyError|SecurityError|format"),
        ("m.content.index('zzz')", "ValueError"),
        ("1 // 0", "ZeroDivisionError"),
        ("range(10 ** 9)", "OverflowError"),
        ("raise_exception('roles must alternate')", "roles must alternate"),
    ],
)
def test_every_exception_of_a_template_is_a_code(
    tokenizer: PreTrainedTokenizerBase, expression: str, error: str
) -> None:
    template = "{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    row = pair_row("{a}", "Yes.", "No.")
    code, field, detail = reject(tokenizer, row, template)
    assert (code, field) == ("TEMPLATE_REFUSED", "prompt")
    assert any(name in detail for name in error.split("|"))


def test_a_template_that_calls_itself_without_end_is_a_code(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    assert reject(tokenizer, pair_row("q", "a", "b"), template)[0] == "TEMPLATE_REFUSED"


def test_text_that_is_no_template_is_a_config_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"line 2"):
        Encoder(tokenizer, "a\n{% for %}", EncodeConfig(template="my.jinja"))


def test_variables_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    row = pair_row("q", "a", "b")
    assert encode(tokenizer, row, HYBRID)[:2] == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\na<|im_end|>",
    )
    assert encode(tokenizer, row, HYBRID, template_kwargs={"enable_thinking": False})[:2] == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "a<|im_end|>",
    )


def test_a_variable_that_no_template_reads_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    config = EncodeConfig(template_kwargs={"enable_thinkin": False})
    with pytest.raises(
        ConfigError, match=r"enable_thinkin: .* reads no such variable.*enable_thinking"
    ):
        Encoder(tokenizer, HYBRID, config)


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "strftime_now", "eos_token"]
)
def test_variables_that_encode_sets_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_config(EncodeConfig, {"template_kwargs": {name: 1}}, path="stages.encode")


def test_variables_without_a_template_are_refused() -> None:
    with pytest.raises(ConfigError, match="no meaning with template: none"):
        parse_config(
            EncodeConfig, {"template": "none", "template_kwargs": {"a": 1}}, path="stages.encode"
        )


def test_variables_and_date_are_identity() -> None:
    config = EncodeConfig(
        template_kwargs={"enable_thinking": False}, template_date=datetime.date(2025, 1, 2)
    )
    dumped = dump_config(config)
    assert dumped["template_kwargs"] == {"enable_thinking": False}
    assert dumped["template_date"] == "2025-01-02"


@pytest.mark.parametrize(
    "date",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}",
    ],
)
def test_the_date_is_the_configs(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    row, template = pair_row("q", "a", "b"), date + turns("")
    config = {"template_date": datetime.date(2025, 1, 2)}
    assert encode(tokenizer, row, template, **config)[0].startswith("02 Jan 2025<|im_start|>")
    encoder = Encoder(tokenizer, template, EncodeConfig())
    encoder.encode_pair(row)
    assert encoder.num_dates > 0


def test_a_template_without_a_date_prints_none(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, turns(""), EncodeConfig())
    encoder.encode_pair(pair_row("q", "a", "b"))
    assert encoder.num_dates == 0


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("form", ["m.{}", "m['{}']", "m.get('{}')"])
def test_a_thought_is_given_under_the_name_that_the_template_reads(
    tokenizer: PreTrainedTokenizerBase, name: str, form: str
) -> None:
    read = form.format(name)
    template = turns("", "('(' ~ " + read + " ~ ')' if " + read + " else '') ~ m.content")
    row = pair_row("q", [message("assistant", "a", reasoning="hm")], "b")
    _, chosen, warnings = encode(tokenizer, row, template)
    assert chosen == "(hm)a<|im_end|>"
    assert warnings == []


def test_a_thought_is_inline_for_a_template_that_looks_for_it_there(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = turns("", "m.content.replace('</think>', '</think>!')")
    row = pair_row("q", [message("assistant", "a", reasoning="hm")], "b")
    _, chosen, warnings = encode(tokenizer, row, template)
    assert chosen == "<think>\nhm\n</think>!\n\na<|im_end|>"
    assert warnings == []


def test_an_answer_without_a_thought_closes_the_one_that_the_prompt_opens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    thought = [message("assistant", "a", reasoning="hm")]
    prompt, chosen, _ = encode(tokenizer, pair_row("q", thought, "b"), OPENED)
    assert (prompt[-8:], chosen) == ("<think>\n", "hm\n</think>\n\na<|im_end|>")
    prompt, chosen, _ = encode(tokenizer, pair_row("q", "a", "b"), OPENED)
    assert (prompt[-8:], chosen) == ("<think>\n", "\n</think>\n\na<|im_end|>")


@pytest.mark.parametrize(
    ("condition", "advice"),
    [
        ("enable_thinking is not false", "{enable_thinking: false}"),
        ("thinking is not defined or thinking", "{thinking: false}"),
        ("not no_reasoning", "{no_reasoning: true}"),
        ("true", "No variable"),
    ],
)
def test_a_thought_that_cannot_be_closed_says_what_to_set(
    tokenizer: PreTrainedTokenizerBase, condition: str, advice: str
) -> None:
    template = STRIPPED.replace("THINKS", condition)
    code, _, detail = reject(tokenizer, pair_row("q", "a", "b"), template)
    assert code == "TOK_PREFIX_MISMATCH"
    assert advice in detail
