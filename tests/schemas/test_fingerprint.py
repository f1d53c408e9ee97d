"""Fingerprints change with everything that decides the rows, and with nothing else."""

import pickle
from typing import Any

import msgspec
import pytest

from schemas import errors
from schemas.fingerprint import InputRef, ReferenceIdentity, attempt_folder, stage_fingerprint
from schemas.manifest import Counts
from schemas.rows import STAGE_TABLES

BASE: dict[str, Any] = {
    "stage": "train",
    "version": 1,
    "identity": {"beta": 0.1, "seed": 0},
    "inputs": {"score": InputRef("aaaaaaaaaaaa")},
}


def test_equal_content_gives_equal_fingerprints() -> None:
    same = {**BASE, "identity": {"seed": 0, "beta": 1e-1}}
    assert stage_fingerprint(**BASE) == stage_fingerprint(**same)
    assert len(stage_fingerprint(**BASE)) == 12


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "score"},
        {"version": 2},
        {"identity": {"beta": 0.2, "seed": 0}},
        {"identity": {"beta": 0.1}},
        {"inputs": {"score": InputRef("bbbbbbbbbbbb")}},
        {"inputs": {"score": InputRef("aaaaaaaaaaaa", attempt=2)}},
        {"inputs": {}},
    ],
)
def test_each_part_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert stage_fingerprint(**{**BASE, **change}) != stage_fingerprint(**BASE)


def test_attempts_after_the_first_have_a_number() -> None:
    assert attempt_folder("abc", 1) == "abc"
    assert attempt_folder("abc", 3) == "abc.3"


def test_every_field_of_a_reference_changes_its_fingerprint() -> None:
    base = ReferenceIdentity(
        weights="w", config="c", dtype="float32", engine="vllm", scorers=1, max_length=None
    )
    others = [msgspec.structs.replace(base, **{field: "other"}) for field in base.__struct_fields__]
    assert len({identity.fingerprint for identity in [base, *others]}) == 1 + len(others)


def test_counts_add_up_by_code() -> None:
    parts = [
        Counts(num_in=3, num_out=2, reasons={"TIE": 1}),
        Counts(num_in=4, num_out=1, reasons={"TIE": 1, "ROLE_ORDER": 2}, more={"num_tokens": 7}),
    ]
    total = Counts.total(parts)
    assert total.num_in == total.num_out + total.num_rejected == 7
    assert total.reasons == {"ROLE_ORDER": 2, "TIE": 2}
    assert total.more == {"num_tokens": 7}


@pytest.mark.parametrize("kind", ["ConfigError", "DataError", "ShardError", "StageFailed"])
def test_errors_cross_processes(kind: str) -> None:
    error = getattr(errors, kind)("found that, wanted this")
    assert isinstance(error, errors.PipelineError)
    assert str(pickle.loads(pickle.dumps(error))) == "found that, wanted this"


def test_every_column_has_a_sentence() -> None:
    for table in STAGE_TABLES.values():
        for column in table.columns:
            assert column.doc.endswith("."), f"{table.name}.{column.name}"
