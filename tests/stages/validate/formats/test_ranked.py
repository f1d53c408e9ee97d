"""Ranked lists give the pairs of the policy, always with the better answer as chosen."""

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.validate.findings import RowFault
from stages.validate.formats.pair_drafts import Answer
from stages.validate.formats.pair_policy import PairPolicy, choose_pairs
from stages.validate.formats.row_reader import RowReader
from tests.stages.validate.formats.test_pairs import EXAMPLES

Row = dict[str, Any]
POLICIES: tuple[PairPolicy, ...] = ("best_vs_worst", "best_vs_random", "adjacent", "all")


def ranked(*ranks: object) -> Row:
    """Return a row of Nectar with the answers a, b, c, …"""
    answers = [{"answer": chr(97 + at), "rank": rank} for at, rank in enumerate(ranks)]
    return EXAMPLES["nectar"] | {"answers": answers}


def pairs_of(row: Row, format_name: str = "nectar", **settings: Any) -> list[str]:
    drafts = RowReader(format=format_name, **settings).read(row)
    return [f"{d.chosen[0]['content']}>{d.rejected[0]['content']}" for d in drafts]


@pytest.mark.parametrize(
    ("policy", "pairs"),
    [
        ("best_vs_worst", ["b>c"]),
        ("adjacent", ["b>a", "d>c"]),
        ("all", ["b>a", "b>d", "b>c", "a>c", "d>c"]),
    ],
)
def test_policies_on_a_list_with_a_tie(policy: PairPolicy, pairs: list[str]) -> None:
    """b is the best, a and d are equal, c is the worst; adjacent places are b a, a d (tie), d c."""
    assert pairs_of(ranked(2, 1, 3, 2), pair_policy=policy) == pairs


def test_random_answer_depends_on_the_prompt_alone() -> None:
    row = ranked(1, 2, 3, 4, 5, 6, 7)
    (pair,) = pairs_of(row, pair_policy="best_vs_random")
    assert pairs_of(row | {"num_responses": 9}, pair_policy="best_vs_random") == [pair]
    others = {
        pairs_of(row | {"prompt": f"\n\nHuman: {n}\n\nAssistant:"}, pair_policy="best_vs_random")[0]
        for n in range(100)
    }
    # 100 draws from 6 answers miss one with a probability below 6 * (5/6)^100 < 1e-6.
    assert others == {f"a>{answer}" for answer in "bcdefg"}


def test_all_pairs_of_a_list_weigh_as_much_as_one() -> None:
    drafts = RowReader(format="nectar", pair_policy="all").read(ranked(1, 2, 3) | {"weight": 6})
    assert [draft.weight for draft in drafts] == [2.0, 2.0, 2.0]
    (draft,) = RowReader(format="nectar").read(ranked(1, 2, 3) | {"weight": 6})
    assert draft.weight == 6.0


def test_ranks_are_stored_so_that_higher_is_better() -> None:
    (draft,) = RowReader(format="nectar").read(ranked(3, 1, 7))
    assert (draft.score_chosen, draft.score_rejected, draft.margin) == (-1.0, -7.0, 6.0)


def test_lower_rank_wins_in_nemo_too_whatever_the_order() -> None:
    row = EXAMPLES["nemo_completions"]
    turned = row | {"completions": row["completions"][::-1]}
    assert pairs_of(row, "nemo_completions") == pairs_of(turned, "nemo_completions")


def test_ultrafeedback_scores_are_mean_ratings() -> None:
    """Helpfulness 5 and honesty 4 have the mean 4.5, against 1; overall_score is 1."""
    (draft,) = RowReader(format="ultrafeedback_raw").read(EXAMPLES["ultrafeedback_raw"])
    assert (draft.score_chosen, draft.score_rejected, draft.margin) == (4.5, 1.0, 3.5)


@pytest.mark.parametrize(
    ("ranks", "min_margin", "code"),
    [
        ((1, 1, 1), 0.0, "TIE"),
        ((1, 2), 1.0, "MARGIN_TOO_SMALL"),
        ((1, 2, 3), 5.0, "MARGIN_TOO_SMALL"),
        ((1,), 0.0, "SCHEMA_MISMATCH"),
        ((), 0.0, "SCHEMA_MISMATCH"),
        ((1, None), 0.0, "LABEL_MISSING"),
        ((1, "N/A"), 0.0, "LABEL_MISSING"),
        ((1, True), 0.0, "LABEL_INVALID"),
        ((1, "inf"), 0.0, "LABEL_INVALID"),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_list_without_a_pair_is_refused(
    ranks: tuple[object, ...], min_margin: float, code: str, policy: PairPolicy
) -> None:
    with pytest.raises(RowFault) as caught:
        pairs_of(ranked(*ranks), pair_policy=policy, min_margin=min_margin)
    assert caught.value.finding.code == code


def test_rating_that_is_no_number_is_a_missing_label() -> None:
    row = EXAMPLES["ultrafeedback_raw"]
    bad = {"response": "x", "annotations": {"helpfulness": {"Rating": "N/A"}}}
    with pytest.raises(RowFault) as caught:
        pairs_of(row | {"completions": [*row["completions"], bad]}, "ultrafeedback_raw")
    finding = caught.value.finding
    assert finding.code == "LABEL_MISSING"
    assert finding.field == "completions.3.annotations.helpfulness.Rating"


def test_min_margin_holds_for_pairs_with_scores_too() -> None:
    row = EXAMPLES["ultrafeedback_binarized"]  # 8.5 against 7
    assert len(RowReader(format="ultrafeedback_binarized", min_margin=1.49).read(row)) == 1
    with pytest.raises(RowFault) as caught:
        RowReader(format="ultrafeedback_binarized", min_margin=1.5).read(row)
    assert caught.value.finding.code == "MARGIN_TOO_SMALL"


@given(
    scores=st.lists(st.integers(0, 4), min_size=2, max_size=6),
    policy=st.sampled_from(POLICIES),
    min_margin=st.sampled_from([0.0, 1.0]),
)
def test_better_answers_win_whatever_the_policy(
    scores: list[int], policy: PairPolicy, min_margin: float
) -> None:
    """Every pair has answers whose scores differ enough, the better one first, and occurs once."""
    answers = [Answer(messages=[{"at": at}], score=score) for at, score in enumerate(scores)]
    may_pair = [(a, b) for a, b in permutations(answers, 2) if a.score - b.score > min_margin]
    try:
        pairs = choose_pairs(answers, policy=policy, min_margin=min_margin, prompt_id="1f")
    except RowFault:
        # Steps of at most min_margin can lead from the best to the worst.
        assert not may_pair or policy == "adjacent"
        return
    assert all(pair in may_pair for pair in pairs)
    assert len({(a.messages[0]["at"], b.messages[0]["at"]) for a, b in pairs}) == len(pairs)
    if policy == "all":
        assert len(pairs) == len(may_pair)
    if policy.startswith("best"):
        assert len(pairs) == 1
        assert pairs[0][0].score == max(scores)


FIELDS = {"prompt": "Tea?", "a": "Yes.", "b": "No.", "c": "Hm."}


def rank(*names: str, status: str = "submitted") -> Row:
    """Return a response that ranks these fields, the best one first."""
    value = [{"rank": at, "value": name} for at, name in enumerate(names, start=1)]
    return {"user_id": "u", "value": value, "status": status}


def record(**responses: list[Row]) -> Row:
    return {"fields": FIELDS, "responses": responses, "suggestions": {"r": rank("c", "b", "a")}}


def test_argilla_ranks_are_averaged_over_the_annotators() -> None:
    """Ranks of a: 1, 2, 2; of b: 2, 3, 1; of c: 3, 1, 3. A draft does not count."""
    submitted = [rank("a", "b", "c"), rank("c", "a", "b"), rank("b", "a", "c")]
    row = record(r=[*submitted, rank("c", "b", "a", status="draft")])
    (draft,) = RowReader(format="argilla_records").read(row)
    assert (draft.chosen[0]["content"], draft.rejected[0]["content"]) == ("Yes.", "Hm.")
    assert (draft.score_chosen, draft.score_rejected) == (-5 / 3, -7 / 3)


def test_argilla_records_of_version_1_are_read() -> None:
    """There the responses stand by annotator, and `datasets` turns a ranking into lists."""
    value = {"rank": [2, 1], "value": ["a", "b"]}
    responses = [{"user_id": "u", "values": {"r": {"value": value}}, "status": "submitted"}]
    row = {"fields": {"prompt": "Tea?", "a": "Yes.", "b": "No."}, "responses": responses}
    assert pairs_of(row, "argilla_records") == ["No.>Yes."]


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        (record(), "LABEL_MISSING", "responses"),
        (record(r=[rank("a", "b", status="discarded")]), "LABEL_MISSING", "responses"),
        (record(r=[{"value": 4}], s=[{"value": "a"}]), "LABEL_MISSING", "responses"),
        (record(r=[rank("A", "B")]), "LABEL_MISSING", "responses"),
        (record(r=[rank("a", "b")], s=[rank("b", "a")]), "LABEL_INVALID", "responses"),
        (record(r=[rank("a", "b"), rank("b", "c")]), "LABEL_INVALID", "responses"),
        (record(r=[rank("a", "b")]), "SCHEMA_MISMATCH", "fields"),
    ],
)
def test_argilla_record_that_is_ambiguous_is_refused(row: Row, code: str, field: str) -> None:
    with pytest.raises(RowFault) as caught:
        pairs_of(row, "argilla_records")
    assert (caught.value.finding.code, caught.value.finding.field) == (code, field)


def test_argilla_system_field_is_part_of_the_prompt() -> None:
    row = record(r=[rank("a", "b", "c")])
    row["fields"] = FIELDS | {"system_prompt": "Be kind."}
    (draft,) = RowReader(format="argilla_records").read(row)
    assert [m["content"] for m in draft.prompt] == ["Be kind.", "Tea?"]
