"""Encode gives the ids of the tokenizer itself and of renderings written by hand."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.recipe import load_recipe
from pipeline.resolve import Resolver
from schemas.errors import ConfigError, DataError, StageFailed
from schemas.ids import sequence_id
from stages.encode.config import EncodeConfig, pin_template
from stages.encode.encoder import Encoder
from stages.encode.template import RowRejected
from tests.stages.encode.running import run_stage
from tests.stages_rows import message, pair_row
from tests.stages_running import read_rows
from tests.tiny_models import VOCAB_SIZE

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def encode(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str = "auto", **config: Any
) -> tuple[dict[str, Any], list[str]]:
    return Encoder(tokenizer, template, EncodeConfig(**config)).encode_pair(row)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_prompt_and_completions_are_what_generation_sees(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The rendering is written by hand; the newline after the last <|im_end|> is left out."""
    encoded, warnings = encode(tokenizer, pair_row("Why?", "Because.", "No idea"))
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert encoded["prompt_ids"] == ids_of(tokenizer, prompt)
    assert encoded["chosen_ids"] == ids_of(tokenizer, "Because.<|im_end|>")
    assert encoded["rejected_ids"] == ids_of(tokenizer, "No idea<|im_end|>")
    assert encoded["chosen_ids"][-1] == tokenizer.eos_token_id
    assert encoded["chosen_loss_mask"] is encoded["rejected_loss_mask"] is None
    assert encoded["truncated"] == 0
    assert warnings == []
    assert encoded["chosen_sequence_id"] == sequence_id(
        encoded["prompt_ids"], encoded["chosen_ids"]
    )


def test_raw_text_keeps_its_leading_space_and_ends_with_eos(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded, _ = encode(tokenizer, pair_row("The sky is", " blue.", " green."), template="none")
    assert encoded["prompt_ids"] == ids_of(tokenizer, "The sky is")
    assert encoded["chosen_ids"] == [*ids_of(tokenizer, " blue."), tokenizer.eos_token_id]


def test_only_assistant_turns_of_a_long_completion_are_scored(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    call = message("assistant", None, tool_calls='[{"name":"f"}]')
    row = pair_row("q", [call, message("tool", "42"), message("assistant", "It is 42.")], "no")
    encoded, _ = encode(tokenizer, row, template=TURNS)
    pieces = [
        ('[{"name": "f"}]<|im_end|>', True),
        ("\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is 42.<|im_end|>", True),
    ]
    assert encoded["chosen_ids"] == [i for text, _ in pieces for i in ids_of(tokenizer, text)]
    mask = [is_scored for text, is_scored in pieces for _ in ids_of(tokenizer, text)]
    assert encoded["chosen_loss_mask"] == mask
    assert encoded["rejected_loss_mask"] is None


def test_reasoning_reaches_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    row = pair_row("q", [message("assistant", "yes", reasoning="hm")], "no")
    encoded, warnings = encode(tokenizer, row, template=TURNS)
    assert warnings == []
    assert encoded["chosen_ids"] == ids_of(tokenizer, "<think>hm</think>yes<|im_end|>")


@pytest.mark.parametrize("template", ["none", "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_reasoning_that_a_template_leaves_out_is_warned_of(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    row = pair_row("q", [message("assistant", "yes", reasoning="hm")], "no")
    _, warnings = encode(tokenizer, row, template=template)
    assert "REASONING_NOT_RENDERED" in warnings
    _, warnings = encode(tokenizer, pair_row("q", "yes", "no"), template=template)
    assert "REASONING_NOT_RENDERED" not in warnings


def test_truncation_cuts_the_prompt_in_front_and_completions_behind(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = pair_row("word " * 60, "a b c " * 30, "d e f " * 30)
    whole, _ = encode(tokenizer, row, max_length=4096, max_prompt_length=2048)
    cut, warnings = encode(tokenizer, row, max_length=40, max_prompt_length=24)
    assert cut["prompt_ids"] == whole["prompt_ids"][-24:]
    assert cut["num_prompt_tokens"] == 24
    assert cut["chosen_ids"] == whole["chosen_ids"][:16]
    assert cut["rejected_ids"] == whole["rejected_ids"][:16]
    assert cut["truncated"] == 1 + 2 + 4
    assert warnings == ["TOK_PROMPT_TRUNCATED", "TOK_TRUNCATED"]


def test_a_bos_token_survives_the_cut_of_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ bos_token }}" + TURNS
    row = pair_row("word " * 60, "yes", "no")
    cut, _ = encode(tokenizer, row, template=template, max_length=40, max_prompt_length=24)
    assert cut["prompt_ids"][0] == tokenizer.bos_token_id
    assert len(cut["prompt_ids"]) == 24


def test_one_side_cut_is_warned_of(tokenizer: PreTrainedTokenizerBase) -> None:
    row = pair_row("q", "short", "long " * 100)
    encoded, warnings = encode(tokenizer, row, max_length=64, max_prompt_length=32)
    assert encoded["truncated"] == 4
    assert warnings == ["TOK_TRUNCATED_ONE_SIDE"]


@pytest.mark.parametrize(
    ("row", "template", "code", "field"),
    [
        (pair_row("q", "x " * 90 + "a", "x " * 90 + "b"), "auto", "TOK_IDENTICAL_AFTER", "chosen"),
        (pair_row("<|im_end|>\n<|im_start|>system", "a", "b"), "auto", "SPECIAL_", "prompt.0.cont"),
        (pair_row("q", "a <|endoftext|>", "b"), "none", "SPECIAL_TOKEN", "chosen.0.content"),
        (
            pair_row("q", "a", "b"),
            "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
            "TOK_PREFIX_MISMATCH",
            "chosen",
        ),
        (pair_row("q", "a", "b"), "{{ raise_exception('no') }}", "TEMPLATE_REFUSED", "prompt"),
        (
            pair_row("q", "a", "b"),
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "TOK_NO_COMPLETION",
            "chosen",
        ),
        (
            pair_row("q", "a", "b"),
            "<|endoftext|><|endoftext|>{% for m in messages %}{{ m.content }}{% endfor %}",
            "TOK_DOUBLE_BOS",
            "prompt",
        ),
        (
            pair_row("q", "a", "b"),
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
            "<|im_end|><|im_end|>{% endif %}{% endfor %}",
            "TOK_DOUBLE_EOS",
            "chosen",
        ),
    ],
)
def test_what_cannot_be_encoded_is_rejected_with_its_code(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str, code: str, field: str
) -> None:
    with pytest.raises(RowRejected) as caught:
        encode(tokenizer, row, template=template, max_length=48, max_prompt_length=24)
    assert caught.value.args[0].startswith(code)
    assert caught.value.args[1].startswith(field)


def test_an_answer_without_an_end_is_warned_of(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    _, warnings = encode(tokenizer, pair_row("q", "a", "b"), template=template)
    assert warnings == ["TOK_EOS_MISSING"]


def test_what_the_tokenizer_does_not_know_is_warned_of() -> None:
    words = {"[UNK]": 0, "</s>": 1, "q": 2, "a": 3, "b": 4}
    model = WordLevel(words, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="[UNK]", eos_token="</s>"
    )
    rows = {("q", "a", "b"): False, ("x", "a", "b"): True, ("q", "a", "x"): True}
    for texts, is_warned in rows.items():
        _, warnings = encode(tokenizer, pair_row(*texts), template="none")
        assert ("TOK_UNK" in warnings) == is_warned


def test_a_merge_across_the_border_is_warned_of(tokenizer: PreTrainedTokenizerBase) -> None:
    """The border is inside a word of the vocabulary: one piece gives other ids than two."""
    word = "question"
    whole = ids_of(tokenizer, word)
    cut = next(
        i
        for i in range(1, len(word))
        if ids_of(tokenizer, word[:i]) + ids_of(tokenizer, word[i:]) != whole
    )
    row = pair_row(word[:cut], word[cut:], " something else")
    encoded, warnings = encode(tokenizer, row, template="none")
    assert warnings == ["TOK_MERGE_AT_BORDER"]
    assert encoded["prompt_ids"] == ids_of(tokenizer, word[:cut])


def test_the_stage_keeps_order_and_accounts_for_every_row(tmp_path: Path, tiny_model: Path) -> None:
    rows = [pair_row(f"q{n}", "a", "<|im_end|>" if n % 3 == 0 else "b") for n in range(7)]
    out = run_stage(tmp_path, tiny_model, rows, "auto")
    kept, refused = read_rows(out), read_rows(out, "rejected")
    assert [row["pair_id"] for row in kept] == [
        row["pair_id"] for n, row in enumerate(rows) if n % 3
    ]
    assert [row["code"] for row in refused] == ["SPECIAL_TOKEN_IN_TEXT"] * 3
    counts = out.committed()[0].counts
    assert (counts.num_in, counts.num_out, counts.num_rejected) == (7, 4, 3)
    lengths = ("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens")
    assert counts.more["num_tokens"] == sum(row[name] for row in kept for name in lengths)


def test_too_many_rejected_rows_fail_the_stage_with_advice(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = [pair_row(f"q{n}", "a", "<|im_end|>" if n < 2 else "b") for n in range(10)]
    with pytest.raises(DataError) as caught:
        run_stage(tmp_path / "more", tiny_model, rows, "auto", max_reject_fraction=0.1)
    message = str(caught.value)
    assert "2 of 10 rows have faults (20.0%; allowed are 10.0%)" in message
    assert "SPECIAL_TOKEN_IN_TEXT: 2 rows" in message
    assert "Set stages.encode.template to prerendered" in message
    assert "stages: {encode: {max_reject_fraction: 0.2}}" in message
    out = run_stage(tmp_path / "allowed", tiny_model, rows, "auto", max_reject_fraction=0.2)
    assert len(read_rows(out)) == 8


def test_a_token_without_an_embedding_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    grown = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    grown.add_special_tokens({"additional_special_tokens": ["<|assistant|>"]})
    template = "{% for m in messages %}{{ m.content }}<|assistant|>{% endfor %}"
    size = len(tokenizer)
    row = pair_row("q", "a", "b")
    encode(grown, row, template=template, vocab_size=size + 1)
    with pytest.raises(RowRejected) as caught:
        encode(grown, row, template=template, vocab_size=size)
    code, field, detail = caught.value.args
    assert (code, field) == ("TOK_OUT_OF_VOCABULARY", "prompt")
    assert f"token {size} ('<|assistant|>'), but the model has {size:,} embeddings" in detail


@pytest.mark.parametrize(("named", "is_own"), [(None, True), ("model", True), ("other", False)])
def test_the_vocabulary_is_that_of_a_model_with_its_own_tokenizer(
    tmp_path: Path, tiny_model: Path, named: str | None, is_own: bool
) -> None:
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path / "other")
    folders = {"model": str(tiny_model), "other": str(tmp_path / "other")}
    encoding = {} if named is None else {"tokenizer": folders[named]}
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "own",
                "store": str(tmp_path / "store"),
                "stages": {
                    "validate": {"inputs": [str(tmp_path / "*.jsonl")]},
                    "encode": encoding,
                    "score": {"model": str(tiny_model), "backend": "transformers"},
                },
            }
        )
    )
    config = Resolver(load_recipe(str(path)), has_gpus=False).config("encode")
    assert config.vocab_size == (VOCAB_SIZE if is_own else None)


RENDERED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ("a<|im_end|>\n", "<|im_end|>"),
        ("a<|im_end|>", "<|im_end|>"),
        ("a<|endoftext|>", "<|endoftext|>"),
        ("a", "<|im_end|>"),
    ],
)
def test_rendered_texts_keep_their_end_and_others_get_the_tokenizers(
    tokenizer: PreTrainedTokenizerBase, answer: str, end: str
) -> None:
    row = pair_row(RENDERED, answer, "b<|im_end|>\n")
    encoded, warnings = encode(tokenizer, row, template="prerendered")
    assert encoded["prompt_ids"] == ids_of(tokenizer, RENDERED)
    assert encoded["chosen_ids"] == ids_of(tokenizer, "a" + end)
    assert encoded["chosen_loss_mask"] is None
    assert warnings == []


@pytest.mark.parametrize("begin", ["<s>", ""])
def test_rendered_texts_begin_with_one_bos(begin: str) -> None:
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "q": 3, "a": 4, "b": 5}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    encoded, _ = encode(tokenizer, pair_row(f"{begin}q", "a</s>", "b"), template="prerendered")
    assert encoded["prompt_ids"] == [1, 3]
    assert (encoded["chosen_ids"], encoded["rejected_ids"]) == ([4, 2], [5, 2])


def test_thoughts_stay_in_rendered_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = [message("assistant", "a<|im_end|>", reasoning="hm")]
    encoded, warnings = encode(tokenizer, pair_row(RENDERED, answer, "b"), template="prerendered")
    assert encoded["chosen_ids"] == ids_of(tokenizer, "<think>\nhm\n</think>\n\na<|im_end|>")
    assert warnings == []


@pytest.mark.parametrize("template", ["none", "prerendered"])
def test_raw_text_cannot_say_tool_calls(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    call = message("assistant", "", tool_calls='[{"name": "f", "arguments": {}}]')
    with pytest.raises(RowRejected, match="TOOL_CALL_LOST"):
        encode(tokenizer, pair_row("q", [call], "b"), template=template)


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"tools": '[{"name": "f", "description": "\\u003c|im_end|>"}]'}, "tools"),
        (
            {"chosen": [message("assistant", None, tool_calls='[{"name": "f\\u003c|im_end|>"}]')]},
            "chosen.0.tool_calls",
        ),
        ({"prompt": [message("user", "q", name="<|im_start|>")]}, "prompt.0.name"),
    ],
)
def test_control_tokens_are_found_wherever_a_template_may_print_them(
    tokenizer: PreTrainedTokenizerBase, changed: dict[str, Any], place: str
) -> None:
    with pytest.raises(RowRejected) as caught:
        encode(tokenizer, {**pair_row("q", "a", "b"), **changed}, template=TURNS)
    assert caught.value.args[:2] == ("SPECIAL_TOKEN_IN_TEXT", place)


def test_a_tokenizer_without_a_template_is_a_clear_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(StageFailed, match=r"no chat template\. Set stages\.encode\.template"):
        run_stage(tmp_path, tmp_path / "bare", [pair_row("q", "a", "b")], "auto")


def test_a_template_is_identified_by_its_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jinja", tmp_path / "other.jinja"
    one.write_text(TURNS)
    other.write_text(TURNS)
    assert pin_template(str(one)).identity() == pin_template(str(other)).identity()
    other.write_text(TURNS + " ")
    assert pin_template(str(one)).identity() != pin_template(str(other)).identity()
    assert pin_template("auto").identity() == "auto"
    with pytest.raises(ConfigError, match="cannot be read"):
        pin_template(str(tmp_path / "absent.jinja"))


def test_lengths_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="below max_length"):
        EncodeConfig(max_length=512, max_prompt_length=512)
