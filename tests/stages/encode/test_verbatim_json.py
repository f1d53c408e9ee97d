"""Schemas and calls of a data file reach the chat template as plain transformers renders them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.stages.encode.running import run_stage
from tests.stages.validate.running import jsonl, validate, write
from tests.stages_running import read_rows

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARGUMENTS = {"to": "Ada", "amount": 20, "rate": 1.0, "at": [{"y": 2, "x": None}], "é": 10**25}


def row(arguments: object, parameters: object) -> dict[str, Any]:
    function = {"name": "send", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    return {
        "prompt": [{"role": "user", "content": "Send it."}],
        "chosen": [{"role": "assistant", "content": "Yes.", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "tools": [{"type": "function", "function": {"name": "send", "parameters": parameters}}],
    }


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("container", ["jsonl", "parquet"])
def test_json_reaches_the_template_verbatim(
    container: str, as_text: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """The oracle renders the row as it was made; Arrow pads it with the other row's keys."""
    parameters = {"required": ["to"], "properties": {"to": {"type": "string", "default": "Eve"}}}
    arguments = dict(ARGUMENTS)
    if container == "parquet" and not as_text:
        # Arrow has no nulls apart from padding, and no integers of more than 64 bits.
        arguments |= {"at": [{"y": 2}], "é": 10**15}
    given = row(json.dumps(arguments) if as_text else arguments, parameters)
    other = row('{"zone": null}' if as_text else {"zone": "UTC"}, {"properties": {"zone": {}}})
    other["prompt"] = [{"role": "user", "content": "When?"}]
    other["tools"][0]["function"]["parameters"]["properties"]["zone"] = {"enum": ["UTC"]}
    if container == "jsonl":
        file = write(tmp_path / "a.jsonl", jsonl([given, other]))
    else:
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist([given, other]), file)
    pairs = validate(tmp_path / "validated", file).pairs
    encoded = read_rows(run_stage(tmp_path / "encoded", tiny_model, pairs, TEMPLATE))

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = row(arguments, parameters)
    rendered = tokenizer.apply_chat_template(
        plain["prompt"] + plain["chosen"],
        tools=plain["tools"],
        chat_template=TEMPLATE,
        tokenize=False,
    )
    found = next(e for e in encoded if e["pair_id"] == pairs[0]["pair_id"])
    ids = found["prompt_ids"] + found["chosen_ids"]
    assert tokenizer.decode(ids) == rendered.removesuffix("\n")
