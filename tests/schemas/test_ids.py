"""pair_id, prompt_id and sequence_id change with every part of the content, and only with it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.ids import (
    canonical_json,
    digest,
    identify_pair,
    pair_id,
    prompt_id,
    sequence_id,
)
from schemas.rows import MESSAGE

USER = {"role": "user", "content": "Häuser?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}


def test_canonical_json_sorts_keys_and_keeps_unicode() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_nan_and_infinity(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json([value])


def test_canonical_json_refuses_values_without_a_stable_identity() -> None:
    with pytest.raises(TypeError):
        canonical_json({1, 2})


def test_pair_id_is_the_sha256_of_the_documented_json() -> None:
    """The expected id follows from the docstring, with json and hashlib alone."""
    content = json.dumps(
        [[USER], [YES], [NO], None], sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    assert pair_id([USER], [YES], [NO]) == hashlib.sha256(content.encode()).hexdigest()[:32]


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [*map(chr, range(0x21)), *map(chr, range(0x7E, 0xA1)), '"', "\\", "/", "\u2028", "\U0010ffff"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
).map(lambda value: json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")))
"""JSON text in canonical form."""
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {f.name: st.none() | (JSON if f.name == "tool_calls" else TEXT) for f in MESSAGE}
    ),
    max_size=3,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prompt=MESSAGES, chosen=MESSAGES, rejected=MESSAGES, tools=st.none() | JSON)
@example(
    prompt=[{"role": "user", "content": "".join(map(chr, range(0x100)))}],
    chosen=[],
    rejected=[],
    tools=json.dumps("".join(map(chr, range(0x100))), ensure_ascii=False),
)
def test_ids_are_hashes_of_canonical_json_for_all_characters(
    prompt: list[dict[str, str | None]],
    chosen: list[dict[str, str | None]],
    rejected: list[dict[str, str | None]],
    tools: str | None,
) -> None:
    """The oracle is `canonical_json`, which uses the standard library's encoder."""
    sides = [
        [{key: value for key, value in m.items() if value is not None} for m in side]
        for side in (prompt, chosen, rejected)
    ]
    expected = digest([*sides, tools])[:32], digest([sides[0], tools])[:32]
    assert identify_pair(prompt, chosen, rejected, tools) == expected
    assert pair_id(prompt, chosen, rejected, tools) == expected[0]
    assert prompt_id(prompt, tools) == expected[1]


def test_order_of_keys_and_white_space_of_json_do_not_change_ids() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": '[{"b":{"d":1,"c":[]},"a":null}]'}
    same = {**calls, "tool_calls": '[ {"a": null, "b": {"c": [], "d": 1}} ]'}
    tools = '[{"y":1.0,"x":"é"}]', '[{"x": "\\u00e9",\n "y": 1.0}]'
    assert identify_pair([USER], [calls], [NO], tools[0]) == identify_pair(
        [USER], [same], [NO], tools[1]
    )
    others = [
        '[{"b":{"d":1.0,"c":[]},"a":null}]',
        '[{"b":{"d":"1","c":[]},"a":null}]',
        '[{"b":{"d":1,"c":[]}}]',
    ]
    ids = {pair_id([USER], [{**calls, "tool_calls": text}], [NO]) for text in others}
    assert len(ids | {pair_id([USER], [calls], [NO])}) == 4


def test_half_a_surrogate_pair_and_unknown_fields_have_no_id() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        pair_id([{"role": "user", "content": "\ud800"}], [YES], [NO])
    with pytest.raises(TypeError):
        pair_id([USER | {"mood": "good"}], [YES], [NO])
    with pytest.raises(ValueError, match="Expecting value"):
        pair_id([USER], [YES], [NO], "no JSON")


def test_absent_fields_do_not_change_ids() -> None:
    padded = {**USER, "reasoning": None, "name": None}
    assert pair_id([padded], [YES], [NO]) == pair_id([USER], [YES], [NO])
    assert prompt_id([padded]) == prompt_id([USER])


def test_every_part_of_a_pair_changes_its_id() -> None:
    ids = {
        pair_id([USER], [YES], [NO]),
        pair_id([USER], [NO], [YES]),
        pair_id([USER, USER], [YES], [NO]),
        pair_id([USER], [YES], [NO], '[{"name":"f"}]'),
        pair_id([{**USER, "content": "Häuser? "}], [YES], [NO]),
    }
    assert len(ids) == 5


def test_sequence_id_depends_on_where_the_prompt_ends() -> None:
    assert sequence_id([1, 2], [3]) != sequence_id([1], [2, 3])
    assert sequence_id([1, 2], [3]) == sequence_id((1, 2), (3,))


def test_sequence_id_is_the_documented_hash() -> None:
    content = b"\x02\0\0\0\0\0\0\0" + b"\x01\0\0\0" + b"\x02\0\0\0" + b"\x00\x01\0\0"
    assert sequence_id([1, 2], [256]) == hashlib.sha256(content).hexdigest()[:32]


def test_ids_are_equal_in_another_process_with_another_hash_seed() -> None:
    code = "from schemas.ids import digest; print(digest({'b': 1e-6, 'a': ['ü', True]}))"
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == digest({"a": ["ü", True], "b": 0.000001})
