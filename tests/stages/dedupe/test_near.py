"""Near-duplicates: which pairs are similar enough, which survive, and which are never merged."""

import math
import random
from itertools import combinations
from pathlib import Path

import pytest

from tests.stages.dedupe.running import (
    WORDS,
    Texts,
    at,
    dedupe,
    jaccard,
    kept_places,
    numbered,
    rejected_codes,
    replace_word,
    say,
    shingles,
    similarity,
    warnings_of,
)
from tests.stages_rows import message, pair_row
from tests.stages_running import read_rows

PROMPT, GOOD, BAD = say(30, 1), say(40, 2), say(40, 3)


def test_a_near_duplicate_is_rejected_with_its_similarity(tmp_path: Path) -> None:
    """Changing a word inside one text replaces 3 of 28 + 38 + 38 shingles: J = 101 / 107."""
    rows = numbered((PROMPT, GOOD, BAD), (PROMPT, replace_word(GOOD, 20), BAD))
    out = dedupe(tmp_path, [rows[:1], rows[1:]], rows_per_shard=1)
    [dropped] = read_rows(out, "rejected")
    [kept] = read_rows(out)
    assert dropped["code"] == "DUP_NEAR"
    assert dropped["kept_pair_id"] == kept["pair_id"] == min(row["pair_id"] for row in rows)
    assert dropped["similarity"] == pytest.approx(101 / 107)


@pytest.mark.parametrize(
    ("changed", "is_near"),
    [([6, 20, 30], True), ([3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33], False)],
)
def test_the_threshold_is_held_exactly(tmp_path: Path, changed: list[int], is_near: bool) -> None:
    """3 places: (38 + 38 + 28 - 9) / (104 + 9) = 0.84. 11 places: 71 / 137 = 0.52."""
    other = GOOD
    for place in changed:
        other = replace_word(other, place, f"changed{'abcdefghijk'[changed.index(place)]}")
    rows = numbered((PROMPT, GOOD, BAD), (PROMPT, other, BAD))
    assert len(kept_places(dedupe(tmp_path, [rows], near={"answer_threshold": 0}))) == (
        1 if is_near else 2
    )


def test_a_similarity_of_just_the_threshold_is_near(tmp_path: Path) -> None:
    rows: tuple[Texts, Texts] = (PROMPT, GOOD, BAD), (PROMPT, replace_word(GOOD, 20), BAD)
    exact = 101 / 107
    for name, threshold, kept in (("at", exact, 1), ("above", math.nextafter(exact, 1), 2)):
        out = dedupe(tmp_path / name, [numbered(*rows)], near={"threshold": threshold})
        assert len(kept_places(out)) == kept, name


@pytest.mark.parametrize("near", [None, False])
def test_near_duplicates_stay_where_they_are_not_sought(tmp_path: Path, near: bool | None) -> None:
    rows = numbered((PROMPT, GOOD, BAD), (PROMPT, replace_word(GOOD, 20), BAD))
    assert len(kept_places(dedupe(tmp_path, [rows], near=near))) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("if x != y then stop", "if x == y then stop"),
        ("if x != y then stop", "if x = y then stop"),
        ("she writes it in C++ at home", "she writes it in C# at home"),
        ("there were 3 apples", "there were 4 apples"),
        ("it is 3.14 or so", "it is 31.4 or so"),
        ("take a - b here", "take a * b here"),
        ("take a-b here", "take a/b here"),
        ("it falls to -5 there", "it falls to 5 there"),
        ("you should take it", "you should not take it"),
        ("you can take it", "you can't take it"),
        ("you can take it", "you can\u2019t take it"),
        ("where a \u2264 b holds", "where a \u2265 b holds"),
        ("it costs 5 \u20ac now", "it costs 5 \u00a3 now"),
        ("it costs \uff15 coins", "it costs \uff16 coins"),
    ],
)
@pytest.mark.parametrize("side", [0, 1, 2])
def test_rows_that_differ_in_what_carries_meaning_stay_with_a_warning(
    tmp_path: Path, one: str, other: str, side: int
) -> None:
    """Among 110 equal words the similarity is above 0.9."""
    texts = [PROMPT, GOOD, BAD]
    rows = []
    for place, phrase in enumerate((one, other)):
        said = [f"{text} {phrase}" if k == side else text for k, text in enumerate(texts)]
        rows.append(at(place, pair_row(*said)))
    out = dedupe(tmp_path, [rows])
    assert kept_places(out) == [0, 1]
    assert warnings_of(out) == {0: ["NEAR_DUP_KEPT"], 1: ["NEAR_DUP_KEPT"]}
    [record] = out.committed().values()
    assert record.counts.warnings == {"NEAR_DUP_KEPT": 2}


def test_numbers_that_change_sides_are_a_difference(tmp_path: Path) -> None:
    rows = numbered((PROMPT, f"{GOOD} 3", f"{BAD} 4"), (PROMPT, f"{GOOD} 4", f"{BAD} 3"))
    out = dedupe(tmp_path, [rows])
    assert set(warnings_of(out)) == {0, 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a well-known man, he said", "a well known man he said"),
        ("- one\n- two and more", "one\ntwo and more"),
        ("it is *very* good", "it is very good!"),
        ("He said: \u201cgo\u201d \u2014 and left\u2026", "he said 'go' and left..."),
        ("CAF\u00c9 au lait", "cafe\u0301 au lait"),
        ("\uff28\uff25\uff2c\uff2c\uff2f there", "hello there"),
    ],
)
def test_spelling_that_carries_no_meaning_makes_no_difference(
    tmp_path: Path, one: str, other: str
) -> None:
    rows = numbered((PROMPT, f"{GOOD} {one}", BAD), (PROMPT, f"{GOOD} {other}", BAD))
    out = dedupe(tmp_path, [rows])
    assert len(kept_places(out)) == 1
    [dropped] = read_rows(out, "rejected")
    assert (dropped["code"], dropped["similarity"]) == ("DUP_NEAR", 1.0)


def test_a_long_prompt_in_common_does_not_make_pairs_the_same(tmp_path: Path) -> None:
    """Two summaries of one long text: the whole pairs are similar, the answers are not."""
    text = say(300, 7)
    rows = numbered((text, say(12, 8), say(12, 9)), (text, say(12, 10), say(12, 11)))
    assert len(kept_places(dedupe(tmp_path / "a", [rows]))) == 2
    off = dedupe(tmp_path / "b", [rows], near={"answer_threshold": 0})
    assert len(kept_places(off)) == 1


def test_one_long_answer_in_common_does_not_make_pairs_the_same(tmp_path: Path) -> None:
    """One best answer against each of the others."""
    rows = numbered((PROMPT, say(300, 7), say(9, 8)), (PROMPT, say(300, 7), say(9, 9)))
    assert len(kept_places(dedupe(tmp_path, [rows]))) == 2


def test_system_messages_do_not_count_but_have_to_be_equal(tmp_path: Path) -> None:
    def asked(system: str, prompt: str) -> list[dict[str, object]]:
        return [message("system", system), message("user", prompt)]

    long = say(500, 5)
    others = [pair_row(asked(long, say(9, k)), say(9, k + 50), say(9, k + 99)) for k in range(4)]
    near = [
        pair_row(asked(system, PROMPT), replace_word(GOOD, place), BAD)
        for system, place in (("be kind", 3), ("be kind", 4), ("be rude", 3))
    ]
    alike = [pair_row(asked(long, say(60, k)), say(9, 40), say(9, 41)) for k in (30, 31)]
    rows = [at(place, row) for place, row in enumerate([*others, *near, *alike])]
    out = dedupe(tmp_path, [rows])
    assert {0, 1, 2, 3, 6, 7, 8} < set(kept_places(out))
    assert list(rejected_codes(out).values()) == ["DUP_NEAR"]


def test_swapped_near_duplicates_are_a_conflict(tmp_path: Path) -> None:
    rows = numbered(
        (PROMPT, GOOD, BAD),
        (PROMPT, replace_word(BAD, 5), replace_word(GOOD, 8)),
        (say(30, 21), say(40, 22), say(40, 23)),
    )
    out = dedupe(tmp_path, [rows])
    assert rejected_codes(out) == {0: "LABEL_CONFLICT", 1: "LABEL_CONFLICT"}


def test_swapped_answers_take_their_numbers_along(tmp_path: Path) -> None:
    rows = numbered((PROMPT, f"{GOOD} 3", BAD), (PROMPT, replace_word(BAD, 5), f"{GOOD} 3"))
    out = dedupe(tmp_path, [rows])
    assert rejected_codes(out) == {0: "LABEL_CONFLICT", 1: "LABEL_CONFLICT"}


@pytest.mark.parametrize(("policy", "kept"), [("majority", {0, 1, 2}), ("larger_margin", {3})])
def test_policies_settle_conflicts_of_near_duplicates(
    tmp_path: Path, policy: str, kept: set[int]
) -> None:
    """Three rows against one with the largest margin; one of the winners is kept."""
    rows = [
        at(0, pair_row(PROMPT, GOOD, BAD), margin=1.0),
        at(1, pair_row(PROMPT, replace_word(GOOD, 8), BAD), margin=1.5),
        at(2, pair_row(PROMPT, replace_word(GOOD, 20), BAD), margin=2.0),
        at(3, pair_row(PROMPT, replace_word(BAD, 9), GOOD), margin=3.0),
    ]
    out = dedupe(tmp_path, [rows], conflict_policy=policy)
    [stays] = kept_places(out)
    assert stays == (2 if policy == "majority" else 3)
    codes = rejected_codes(out)
    losers = {place for place, code in codes.items() if code == "LABEL_CONFLICT"}
    assert losers == {0, 1, 2, 3} - kept
    winner = rows[stays]["pair_id"]
    assert {row["kept_pair_id"] for row in read_rows(out, "rejected")} == {winner}


def test_survivor_by_source_then_margin(tmp_path: Path) -> None:
    texts = [(PROMPT, replace_word(GOOD, place), BAD) for place in (5, 15, 25)]
    rows = [at(place, pair_row(*row)) for place, row in enumerate(texts)]
    rows[0] |= {"source": "web", "margin": 1.0}
    rows[1] |= {"source": "web", "margin": -3.0}
    rows[2] |= {"source": "human"}
    assert kept_places(dedupe(tmp_path / "margin", [rows])) == [1]
    by_source = dedupe(tmp_path / "source", [rows], source_priority=["human"])
    assert kept_places(by_source) == [2]


def test_a_row_is_rejected_only_if_it_is_similar_to_a_kept_one(tmp_path: Path) -> None:
    """A chain in which each row resembles only its neighbours: every second one survives."""
    texts = [GOOD]
    for start in (1, 8, 15, 22, 29):
        changed = texts[-1]
        for place in (start, start + 3):
            changed = replace_word(changed, place, f"x{WORDS[place]}")
        texts.append(changed)
    rows = [
        at(place, pair_row(PROMPT, text, BAD), margin=10.0 - place)
        for place, text in enumerate(texts)
    ]
    said: list[Texts] = [(PROMPT, text, BAD) for text in texts]
    near = {(a, b) for a, b in combinations(range(6), 2) if similarity(said[a], said[b]) >= 0.85}
    assert near == {(k, k + 1) for k in range(5)}
    out = dedupe(tmp_path, [rows], near={"threshold": 0.85})
    assert kept_places(out) == [0, 2, 4]
    kept_by = {row["source_row"]: row["kept_pair_id"] for row in read_rows(out, "rejected")}
    assert kept_by == {place: rows[place - 1]["pair_id"] for place in (1, 3, 5)}


@pytest.mark.parametrize(
    ("first", "last"),
    [(0x4E00, 0x9FA0), (0x0E01, 0x0E2E), (0x3041, 0x3090)],
    ids=["Han", "Thai", "kana"],
)
def test_near_duplicates_in_scripts_without_spaces_are_found(
    tmp_path: Path, first: int, last: int
) -> None:
    """Without spaces each text would be a single shingle if split into words: J = 0."""
    generator = random.Random(5)

    def write(length: int) -> str:
        return "".join(chr(generator.randrange(first, last)) for _ in range(length))

    prompt, good, bad = write(60), write(80), write(80)
    edited = good[:40] + good[41:]
    rows = numbered((prompt, good, bad), (prompt, edited, bad), (write(60), write(80), write(80)))
    out = dedupe(tmp_path, [rows])
    [dropped] = read_rows(out, "rejected")
    # 56 + 76 + 76 5-grams; deleting one inner character loses 5 and adds 4.
    assert dropped["similarity"] == pytest.approx(203 / 212)


def test_short_texts_are_near_only_as_a_whole(tmp_path: Path) -> None:
    rows = numbered(
        ("hi there", "hello you", "go away"),
        ("Hi, there!", "Hello you.", "go away"),
        ("hi there", "hello she", "go away"),
        ("hi where", "hello you", "go away"),
    )
    out = dedupe(tmp_path, [rows])
    codes = rejected_codes(out)
    assert list(codes.values()) == ["DUP_NEAR"]
    assert set(codes) < {0, 1}


@pytest.mark.parametrize(("one", "other"), [("\U0001f600", "\U0001f621"), ("+", "-"), ("?", "!")])
def test_texts_without_words_are_compared_exactly(tmp_path: Path, one: str, other: str) -> None:
    rows = numbered(("say it", one, "hm"), ("say it", other, "hm"), ("Say it!", one, "hm"))
    codes = rejected_codes(dedupe(tmp_path, [rows]))
    assert list(codes.values()) == ["DUP_NEAR"]
    assert set(codes) < {0, 2}


@pytest.mark.parametrize("num_rows", [0, 1])
def test_zero_rows_or_one(tmp_path: Path, num_rows: int) -> None:
    out = dedupe(tmp_path, [numbered((PROMPT, GOOD, BAD))[:num_rows]])
    assert len(read_rows(out)) == num_rows


def test_many_near_duplicates_leave_one(tmp_path: Path) -> None:
    """More rows than are compared with each other in one bucket."""
    generator = random.Random(3)
    texts: list[Texts] = []
    for _ in range(120):
        edited = replace_word(GOOD, generator.randrange(40), generator.choice(WORDS))
        texts.append((PROMPT, edited, replace_word(BAD, generator.randrange(40))))
    rows = numbered(*texts)
    least = min(similarity(one, other) for one, other in combinations(texts, 2))
    assert least > 0.75
    out = dedupe(tmp_path, [rows[:50], rows[50:]], rows_per_shard=30)
    assert len(kept_places(out)) == 1


def make_edited(generator: random.Random) -> list[Texts]:
    """Return 60 texts, each followed by three copies with up to 12 % of the words changed."""
    texts: list[Texts] = []
    for _ in range(60):
        base = [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) for _ in range(3)]
        for share in (0.0, 0.02, 0.05, 0.12):
            sides = [
                " ".join(
                    generator.choice(WORDS) if generator.random() < share else word
                    for word in text.split()
                )
                for text in base
            ]
            texts.append((sides[0], sides[1], sides[2]))
    return texts


def is_near(one: Texts, other: Texts) -> bool:
    same = [jaccard(shingles(one[side]), shingles(other[side])) for side in (1, 2)]
    return similarity(one, other) >= 0.7 and min(same) >= 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_rejected_rows_are_those_found_by_comparing_all_with_all(tmp_path: Path, seed: int) -> None:
    """Recall of at least 0.99 and precision of 1, by plain Python sets over all pairs of rows."""
    texts = make_edited(random.Random(seed))
    rows = numbered(*texts)
    near = [
        pair for pair in combinations(range(len(texts)), 2) if is_near(*(texts[k] for k in pair))
    ]
    assert len(near) > 100
    out = dedupe(tmp_path, [rows[:100], rows[100:]], rows_per_shard=70)
    kept = set(kept_places(out))
    missed = [pair for pair in near if kept.issuperset(pair)]
    assert len(missed) <= 0.01 * len(near)

    text_of = {row["pair_id"]: said for row, said in zip(rows, texts, strict=True)}
    dropped = [row for row in read_rows(out, "rejected") if row["code"] == "DUP_NEAR"]
    assert dropped
    for row in dropped:
        one, other = texts[row["source_row"]], text_of[row["kept_pair_id"]]
        assert is_near(one, other)
        assert row["similarity"] == pytest.approx(similarity(one, other))
    assert {row["kept_pair_id"] for row in dropped} <= {row["pair_id"] for row in read_rows(out)}
