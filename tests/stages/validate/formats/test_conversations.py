"""Two transcripts are split alike whether their common part is read once or twice."""

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stages.validate.findings import Finding, RowFault
from stages.validate.formats.conversations import (
    read_transcript,
    read_transcripts,
    split_shared_prompt,
)
from stages.validate.formats.pair_drafts import Sides

TURNS = st.lists(
    st.tuples(
        st.sampled_from(["\n\nHuman:", "\n\nAssistant:"]),
        st.sampled_from(["", " Hi", " Tea?\n", " <think>Hm.</think>Yes", " Human: no", "\n\nA"]),
    ).map("".join),
    max_size=4,
).map("".join)


def split_both(chosen: str, rejected: str, warnings: list[Finding]) -> Sides:
    conversations = read_transcript(chosen, "chosen"), read_transcript(rejected, "rejected")
    return split_shared_prompt(*conversations, warnings)


@given(common=TURNS, chosen=TURNS, rejected=TURNS)
@example(common="\n\nHuman: Q\n\nAssistant:", chosen=" A", rejected=" B")
@example(common="\n\nHuman: Q\n\nAssistant:", chosen=" A", rejected=" B\n\nHuman: R")
@example(common="\n\nAssistant: P\n\nAssistant:", chosen=" A", rejected=" B")
def test_reading_the_common_part_once_changes_nothing(
    common: str, chosen: str, rejected: str
) -> None:
    def outcome(split: Callable[[str, str, list[Finding]], Sides]) -> object:
        warnings: list[Finding] = []
        try:
            return split(common + chosen, common + rejected, warnings), warnings
        except RowFault as fault:
            return fault.finding

    assert outcome(read_transcripts) == outcome(split_both)


def test_a_conversation_that_is_the_beginning_of_the_other_answers_another_prompt() -> None:
    with pytest.raises(RowFault) as caught:
        read_transcripts("\n\nAssistant: A", "\n\nAssistant: A\n\nHuman: Q\n\nAssistant: B", [])
    finding = caught.value.finding
    assert (finding.code, finding.detail) == ("PROMPT_MISMATCH", "no message against 'Q'")
