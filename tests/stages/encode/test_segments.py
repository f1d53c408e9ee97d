"""Of a rendered conversation, what the model generates is scored, and nothing else."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.encode.config import EncodeConfig
from stages.encode.encoder import Encoder
from stages.encode.segments import TurnEnds
from tests.stages.encode.templates import HYBRID, OTHER_END, plain_rendering
from tests.stages_rows import message, pair_row
from tests.tiny_models import CHATML, make_tiny_tokenizer

CALL = '[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]'


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def split(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str
) -> tuple[str, list[tuple[bool, str]], list[str]]:
    """Return the decoded prompt, the chosen side in pieces that are scored or not, warnings."""
    config = EncodeConfig(max_length=4096, max_prompt_length=2048)
    encoded, warnings = Encoder(tokenizer, template, config).encode_pair(row)
    ids = encoded["chosen_ids"]
    mask = encoded["chosen_loss_mask"] or [True] * len(ids)
    pieces = [
        (is_scored, tokenizer.decode([token for token, _ in group]))
        for is_scored, group in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    ]
    return tokenizer.decode(encoded["prompt_ids"]), pieces, warnings


def test_an_answer_of_several_steps_is_masked_by_role(tokenizer: PreTrainedTokenizerBase) -> None:
    """The template would render the first step with an empty thought if it were the last."""
    side = [
        message("assistant", None, tool_calls=CALL),
        message("tool", "21"),
        message("assistant", "It is 21."),
    ]
    _, pieces, _ = split(tokenizer, pair_row("q", side, "no"), HYBRID)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'
    assert pieces == [
        (True, call),
        (False, "\n<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\n"),
        (True, "<think>\n\n</think>\n\nIt is 21.<|im_end|>"),
    ]


def test_a_middle_answer_ends_as_it_is_rendered_there(tokenizer: PreTrainedTokenizerBase) -> None:
    side = [message("assistant", "One."), message("user", "And?"), message("assistant", "Two.")]
    _, pieces, _ = split(tokenizer, pair_row("q", side, "no"), OTHER_END)
    assert pieces == [
        (True, "One.<|im_end|>"),
        (False, "<|im_start|>user\nAnd?<|im_end|><|im_start|>assistant\n"),
        (True, "Two.<|endoftext|>"),
    ]


def test_a_history_that_is_rendered_otherwise_later_keeps_its_borders(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Before the last step is there, the template prints the first step's thought; then no more."""
    template = (
        "{% set has_answer = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.thinking and not (m.tool_calls and has_answer) %}({{ m.thinking }}){% endif %}"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    side = [
        message("assistant", None, tool_calls=CALL, reasoning="Ask."),
        message("tool", "21"),
        message("assistant", "It is 21.", reasoning="Got it."),
    ]
    _, pieces, warnings = split(tokenizer, pair_row("q", side, "no"), template)
    assert pieces == [
        (True, '{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>'),
        (False, "\n<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\n"),
        (True, "(Got it.)It is 21.<|im_end|>"),
    ]
    assert "REASONING_NOT_RENDERED" in warnings


@pytest.mark.parametrize(
    ("closing", "kept"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|im_end|>\n<|endoftext|>", "<|im_end|>"),
        ("<|im_start|><|im_end|>\n\n", "<|im_start|><|im_end|>"),
        ("<|im_end|>", "<|im_end|>"),
        (" <|endoftext|> ", " <|endoftext|>"),
    ],
)
def test_a_turn_ends_with_what_the_template_ends_it_with(
    tokenizer: PreTrainedTokenizerBase, closing: str, kept: str
) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        + closing.replace("\n", "{{ '\n' }}")
        + "{% else %}:{% endif %}{% endfor %}"
    )
    _, pieces, warnings = split(tokenizer, pair_row("q", "Yes.", "No."), template)
    assert pieces == [(True, f"Yes.{kept}")]
    assert "TOK_EOS_MISSING" not in warnings


def test_an_end_other_than_the_tokenizers_is_an_end() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    _, pieces, warnings = split(tokenizer, pair_row("q", "Yes.", "No."), CHATML)
    assert pieces == [(True, "Yes.<|im_end|>")]
    assert warnings == []


def test_a_text_without_a_control_token_has_no_end() -> None:
    ends = TurnEnds(["<|e|>"])
    assert ends.find_end("a<|e|>b\n") is None
    assert ends.find_end("a<|e|>\n") == len("a<|e|>")
    assert TurnEnds([]).find_end("a") is None


_TEXTS = st.text(alphabet="ab c\n{}é", min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.tuples(_TEXTS, _TEXTS), min_size=1, max_size=3),
    template=st.sampled_from([CHATML, HYBRID, OTHER_END]),
    last=_TEXTS,
)
def test_prompt_and_pieces_are_the_whole_rendering(
    texts: list[tuple[str, str]], template: str, last: str
) -> None:
    """Prompt and completion, decoded, are what plain Jinja renders, up to the end of the turn."""
    tokenizer = make_tiny_tokenizer()
    side = [
        turn
        for answer, question in texts
        for turn in (message("assistant", answer), message("user", question))
    ]
    side.append(message("assistant", last))
    messages = [message("user", "q"), *side]
    whole = plain_rendering(template, messages)
    row = pair_row("q", side, last + "!")
    prompt, pieces, _ = split(tokenizer, row, template)
    assert prompt == plain_rendering(template, messages[:1], add_generation_prompt=True)
    assert prompt + "".join(text for _, text in pieces) == whole.rstrip("\n")
    scored = [text for is_scored, text in pieces if is_scored]
    assert len(scored) == len(texts) + 1
    for text, answer in zip(scored, [*(answer for answer, _ in texts), last], strict=True):
        assert text.removesuffix("<|im_end|>").removesuffix("<|endoftext|>").endswith(answer)
        assert text.endswith(("<|im_end|>", "<|endoftext|>"))
