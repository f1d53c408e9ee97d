"""Tables of text are read as spreadsheets and libraries write them."""

import csv
import io
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest

from schemas.errors import DataError
from stages.validate.findings import Finding
from stages.validate.reading import read_rows, sniff_container, whole_file
from tests.stages.validate.running import Outcome, find_files, validate, write

TEXTS = ("Where is Oslo?", 'In Norway, "north"\nof us; or\tso.', "In Spain | not.")
NAMES = ("prompt", "chosen", "rejected")
ROWS = [dict(zip(NAMES, TEXTS, strict=True)), dict(zip(NAMES, "QAB", strict=True))]


def texts(outcome: Outcome) -> list[tuple[str, str, str]]:
    return [
        (pair["prompt"][0]["content"], pair["chosen"][0]["content"], pair["rejected"][0]["content"])
        for pair in outcome.pairs
    ]


def contents(path: Path) -> list[dict[str, Any] | Finding]:
    (file,) = find_files(path)
    return [row.content for row in read_rows(whole_file(file, sniff_container(file)))]


def written(path: Path, **settings: Any) -> Path:
    pd.DataFrame(ROWS).to_csv(path, **settings)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"index": False},
        {"sep": "\t"},
        {"sep": ";"},
        {"sep": "|"},
        {"encoding": "utf-8-sig", "quoting": csv.QUOTE_ALL},
        {"lineterminator": "\r\n"},
        {"index_label": "row no. (#)"},
        {"index_label": 'it\'s 100 %, "so": [x]\n& more?'},
    ],
    ids=str,
)
def test_table_of_pandas_is_read_with_its_index(settings: dict[str, Any], tmp_path: Path) -> None:
    outcome = validate(tmp_path / "out", written(tmp_path / "a.csv", **settings))
    assert texts(outcome) == [TEXTS, ("Q", "A", "B")]
    assert outcome.rejected == []
    if not settings:
        assert outcome.pairs[1]["extra"] == '{"Unnamed: 0":"1"}'


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_table_of_polars_is_read(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pl.DataFrame(ROWS).write_csv(path, include_bom=True, separator=separator, quote_style="always")
    assert texts(validate(tmp_path / "out", path)) == [TEXTS, ("Q", "A", "B")]


@pytest.mark.parametrize(
    "content",
    [
        b'"","prompt","chosen","rejected"\n"1","Q","A","B"\n',  # R's write.csv
        b'"";"prompt";"chosen";"rejected"\n"1";"Q";"A";"B"\n',  # R's write.csv2
        b"\xef\xbb\xbfsep=;\r\nprompt;chosen;rejected\r\nQ;A;B\r\n",  # Excel
        b"SEP=,\nprompt,chosen,rejected\nQ,A,B\n",
        b"prompt,chosen,rejected,,\r\nQ,A,B,,\r\n",  # Excel, with empty columns
        b"\r\n\r\nprompt,chosen,rejected\r\nQ,A,B\r\n",
        b"prompt, chosen, rejected\nQ, A, B\n",
        b"prompt\t chosen\trejected \nQ\tA\tB\n",
        b'"prompt", "chosen", "rejected"\n"Q", "A", "B"\n',
        b"prompt;chosen, or better;rejected;chosen\nQ;1, 2;B;A\n",
        b"\tprompt\tchosen\trejected\n0\tQ\tA\tB\n",
    ],
)
def test_header_of_any_writer_is_read(content: bytes, tmp_path: Path) -> None:
    assert texts(validate(tmp_path / "out", write(tmp_path / "a", content))) == [("Q", "A", "B")]


def test_words_for_missing_cells_are_no_numbers_and_worth_a_warning(tmp_path: Path) -> None:
    """R writes NA without quotes, which the parser cannot tell from an answer."""
    header = b'"","prompt","chosen","rejected","score_chosen","score_rejected"\n'
    path = write(tmp_path / "a.csv", header + b'"1","Q","A","B",NA,#N/A\n"2","Q","A",NA,2,1\n')
    first, second = validate(tmp_path / "out", path).pairs
    assert (first["score_chosen"], first["score_rejected"], first["warnings"]) == (None, None, [])
    assert (second["margin"], second["warnings"]) == (1.0, ["MISSING_AS_TEXT"])


def test_spaces_belong_to_values_unless_the_header_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"prompt,chosen,rejected\nQ, A,B \n")
    assert texts(validate(tmp_path / "out", path)) == [("Q", " A", "B ")]


def test_empty_cell_is_null(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'a,b,c\n1,,""\n')
    assert contents(path) == [{"a": "1", "b": None, "c": None}]


def test_delimiter_is_the_one_that_cuts_the_rows_like_the_header(tmp_path: Path) -> None:
    """With commas, the header has two names and each row four values."""
    path = write(tmp_path / "a.csv", b"a,b;c\n1,2,3,4;5\n1,2,3,4;5\n")
    assert contents(path) == [{"a,b": "1,2,3,4", "c": "5"}] * 2


def test_ragged_and_broken_rows_say_their_lines(tmp_path: Path) -> None:
    """A quoted newline makes a row's line differ from its number."""
    content = b'prompt,chosen,rejected\n"Q\n1",A,B\nQ,A\n\nQ,A,B,C\n"Q\n2",A\nQ,"A"x,B\nQ,"A,B\n'
    outcome = validate(tmp_path / "out", write(tmp_path / "a.csv", content))
    assert [pair["source_row"] for pair in outcome.pairs] == [0]
    assert [(row["source_row"], row["code"], row["detail"]) for row in outcome.rejected] == [
        (1, "CSV_RAGGED", "2 values under 3 column names (line 4)"),
        (3, "CSV_RAGGED", "4 values under 3 column names (line 6)"),
        (4, "CSV_RAGGED", "2 values under 3 column names (lines 7 to 8)"),
        (5, "CSV_INVALID", "',' expected after '\"' (line 9)"),
        (6, "CSV_INVALID", "unexpected end of data (line 10)"),
    ]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("prompt;chosen;rejected;réf\nQ;A;B;1\n".encode("latin-1"), "header is not UTF-8"),
        ("prompt;chosen;rejected\nQ;A;B\n".encode("utf-16"), "is UTF-16"),
        ("prompt,chosen,rejected\nQ,A,B\n".encode("utf-16-le"), "is UTF-16"),
        (b"prompt,chosen,rejected\rQ,A,B\r", "carriage return alone"),
        (b"prompt,chosen,chosen,rejected\nQ,A,A,B\n", "names the column 'chosen' twice"),
        (
            b"prompt,chosen,rejected\nQ,A\nQ,A,B,C\n",
            r"first 2 rows can be read as csv: row 0 \(line 2\): CSV_RAGGED \(2 values",
        ),
    ],
)
def test_table_that_cannot_be_read_says_why(content: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match) as caught:
        validate(tmp_path / "out", write(tmp_path / "a.csv", content))
    assert "a.csv" in str(caught.value)


def test_header_in_the_middle_is_no_row(tmp_path: Path) -> None:
    """`to_csv(mode="a")` writes the header each time."""
    path = written(tmp_path / "a.csv")
    outcome = validate(tmp_path / "out", written(path, mode="a"))
    assert texts(outcome) == [TEXTS, ("Q", "A", "B")] * 2
    assert [(row["code"], row["detail"]) for row in outcome.rejected] == [
        ("CSV_INVALID", "repeats the header (line 5)")
    ]


def test_cell_of_another_encoding_is_rejected_alone(tmp_path: Path) -> None:
    content = "prompt;chosen;rejected\nOù?;A;B\nQ;A;B\n".encode("latin-1")
    outcome = validate(tmp_path / "out", write(tmp_path / "a.csv", content))
    assert texts(outcome) == [("Q", "A", "B")]
    assert [(row["code"], row["field"]) for row in outcome.rejected] == [
        ("ENCODING_INVALID", "prompt")
    ]


def test_rows_of_a_table_are_those_of_the_standard_parser(tmp_path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    rows = [[f"{at}", 'a "b"\r\nc', ",;\t|", "é\u2028"] for at in range(100)]
    writer.writerows([["w", "x", "y", "z"], *rows])
    path = write(tmp_path / "a.csv", text.getvalue().encode())
    assert contents(path) == [dict(zip("wxyz", row, strict=True)) for row in rows]
