"""JSON that is spread over lines gives the rows that Python's own parser finds in it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.validate.reading import json_arrays as arrays
from stages.validate.reading import read_rows, sniff_container, whole_file
from tests.stages.validate.running import find_files

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\[]{},:\n\u2028é'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='b"\\]},'), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(
        st.dictionaries(st.text(alphabet='c"\\,'), VALUES, max_size=3), min_size=1, max_size=4
    ),
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
    buffer_bytes=st.sampled_from([1, 2, 3, 7, 64]),
)
def test_rows_are_those_of_the_standard_parser_however_chunks_fall(
    rows: list[dict[str, Any]],
    indent: int | None,
    is_ascii: bool,
    buffer_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    (file,) = find_files(path)
    container = sniff_container(file)
    assert container.kind == "json array"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BUFFER_BYTES", buffer_bytes)
        read = list(read_rows(whole_file(file, container)))
    assert [row.content for row in read] == rows
    assert [row.number for row in read] == list(range(len(rows)))
    assert [json.loads(row.raw or b"") for row in read] == rows


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(
        st.dictionaries(st.text(alphabet='c"\\,'), VALUES, min_size=1, max_size=3),
        min_size=2,
        max_size=4,
    ),
    between=st.sampled_from(["", "\n", " \r\n\n"]),
    buffer_bytes=st.sampled_from([1, 2, 3, 7, 64]),
)
def test_objects_one_after_another_are_those_of_the_standard_parser(
    rows: list[dict[str, Any]],
    between: str,
    buffer_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    text = between.join(json.dumps(row, indent=1, ensure_ascii=False) for row in rows)
    path = tmp_path_factory.mktemp("objects") / "a.json"
    path.write_text(text, encoding="utf-8", newline="")
    (file,) = find_files(path)
    container = sniff_container(file)
    assert container.kind == "json objects"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BUFFER_BYTES", buffer_bytes)
        read = list(read_rows(whole_file(file, container)))
    assert [row.content for row in read] == rows
    starts = [text.find(json.dumps(rows[0], indent=1, ensure_ascii=False))]
    for row in read:
        found = text.index((row.raw or b"").decode(), starts[-1])
        assert row.line == text.count("\n", 0, found) + 1
        starts.append(found + len((row.raw or b"").decode()))
