"""Stage encode: turn pairs into token ids, the one place where text becomes tokens.

The prompt is rendered with the generation prompt, the sides without; the rendered prompt must be a
*text* prefix of both. Ids are tokens(prompt) + tokens(rest), as a model sees them that is given the
prompt and then generates. All later stages read these ids, so they cannot disagree on tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from schemas.config import config_class
from schemas.errors import ConfigError
from schemas.ids import digest, sequence_id
from schemas.manifest import Counts, ShardRecord
from schemas.rows import ENCODED, REJECTED
from stages.cost import measure_lengths
from stages.models.fetch import fetch_tokenizer
from stages.models.resolve import AdapterPin, TokenizerPin, pin_tokenizer
from stages.stage import (
    AlignedShards,
    Cost,
    Execution,
    RecipeView,
    ShardWorker,
    Stage,
    StageContext,
    StageResult,
    align_shards,
    count_aligned_shards,
)
from stages.store.filesystems import Folder
from stages.store.shards import StageDir, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_CUT, CHOSEN_CUT, REJECTED_CUT = 1, 2, 4
_ROWS_AT_ONCE = 512
_TEMPLATE_WORDS = ("auto", "none")

REASONS = {
    "TEMPLATE_REFUSED": "The chat template cannot render the messages.",
    "TOK_PREFIX_MISMATCH": "The rendered conversation does not begin with the rendered prompt.",
    "SPECIAL_TOKEN_IN_TEXT": "A text contains one of the tokenizer's own control tokens.",
    "TOK_DOUBLE_BOS": "The prompt begins with two BOS tokens: template and tokenizer both add one.",
    "TOK_DOUBLE_EOS": "An answer ends with two EOS tokens.",
    "TOK_NO_COMPLETION": "An answer has no token to score.",
    "TOK_IDENTICAL": "Both answers are the same tokens.",
    "TOK_IDENTICAL_AFTER_TRUNCATION": "Both answers are the same tokens after truncation.",
}
"""Meanings of the codes that reject a pair."""

WARNINGS = {
    "REASONING_NOT_RENDERED": "The chat template leaves out an answer's reasoning.",
    "TOK_MERGE_AT_BORDER": "Tokenising prompt and answer in one piece would give other tokens.",
    "TOK_EOS_MISSING": "An answer does not end with a special token: nothing teaches it to stop.",
    "TOK_UNK": "A text has characters that the tokenizer does not know.",
    "TOK_PROMPT_TRUNCATED": "The prompt lost its beginning.",
    "TOK_TRUNCATED": "Both answers lost their ends.",
    "TOK_TRUNCATED_ONE_SIDE": "Only one of the answers lost its end.",
}
"""Meanings of the codes that warn about a kept pair."""

Row = Mapping[str, Any]


@config_class
class EncodeConfig:
    """How messages become token ids."""

    tokenizer: str | None = None
    """Tokenizer: Hugging Face id, folder or `sample:` name; absent = that of stages.score.model."""
    template: str = "auto"
    """Chat template: auto = the tokenizer's own, none = contents as raw text, or a Jinja file."""
    max_length: int = 1024
    """Largest number of tokens of prompt and completion together; longer completions lose their
    end."""
    max_prompt_length: int = 512
    """Largest number of tokens of the prompt; longer prompts lose their beginning (a BOS token
    stays)."""

    def __post_init__(self) -> None:
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError("max_prompt_length must be above 0 and below max_length")


class TemplatePin(msgspec.Struct, frozen=True):
    """A chat template pinned to its content."""

    text: str
    """The word auto or none, or the template itself."""

    def identity(self) -> str:
        """Return what is hashed: the word, or the template's digest."""
        return self.text if self.text in _TEMPLATE_WORDS else digest(self.text)


def pin_template(template: str) -> TemplatePin:
    """Read the template that a config names.

    Raises:
        ConfigError: it names a file that cannot be read.
    """
    if template in _TEMPLATE_WORDS:
        return TemplatePin(template)
    try:
        return TemplatePin(Path(template).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"stages.encode.template: {template} cannot be read ({error}). "
            "Write auto, none, or the path of a Jinja chat template."
        ) from error


class RowRejected(Exception):
    """A row cannot be encoded; carries (code, field, detail)."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a completion's text."""

    text: str
    is_scored: bool
    """Whether the model generates it; false for tool results and text of the template."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One side's tokens before truncation."""

    ids: list[int]
    loss_mask: list[bool]


class Encoder:
    """Turns rows of the pairs table into rows of the encoded table.

    Args:
        tokenizer: a fast tokenizer.
        template: "auto" (the tokenizer's own), "none" (raw text), or a chat template's text.
        config: lengths.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: str, config: EncodeConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._is_raw = template == "none"
        self._template = None if template in _TEMPLATE_WORDS else template
        self._config = config
        self._special = _match_any(_special_tokens(tokenizer))
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {number for number, token in added if token.special}
        self._special_ids.update(tokenizer.all_special_ids)
        # A template writes BOS itself; raw text gets the tokens that the tokenizer adds.
        wrapped = tokenizer("", add_special_tokens=True)["input_ids"] if self._is_raw else []
        self._prefix = [token for token in wrapped if token != tokenizer.eos_token_id]

    def encode_pair(self, row: Row) -> tuple[dict[str, Any], list[str]]:
        """Encode one pair.

        Args:
            row: a row of the pairs table.
        Returns:
            A row of the encoded table, and codes of warnings.
        Raises:
            RowRejected: it cannot be encoded; carries (code, field, detail).
        """
        self._refuse_special_tokens(row)
        prompt_text = self._render(row["prompt"], row["tools"], True)
        prompt_ids = self._prefix + self._tokenize(prompt_text)
        sides = {side: self._encode_side(row, side, prompt_text) for side in ("chosen", "rejected")}
        warnings = self._find_merges(prompt_text, prompt_ids, sides)
        warnings += self._check_ids(prompt_ids, {s: side.ids for s, (side, _) in sides.items()})
        texts = {side: text for side, (_, text) in sides.items()}
        if any(_loses_reasoning(row[side], text) for side, text in texts.items()):
            warnings.append("REASONING_NOT_RENDERED")
        return self._truncate(
            row, prompt_ids, {s: side for s, (side, _) in sides.items()}, warnings
        )

    def _encode_side(self, row: Row, side: str, prompt_text: str) -> tuple[Completion, str]:
        segments = self._split_side(row, side, prompt_text)
        ids: list[int] = []
        loss_mask: list[bool] = []
        for segment in segments:
            piece = self._tokenize(segment.text)
            ids += piece
            loss_mask += [segment.is_scored] * len(piece)
        if self._is_raw:
            ids.append(self._end_of_text())
            loss_mask.append(True)
        if not any(loss_mask):
            raise RowRejected("TOK_NO_COMPLETION", side, "no token of it would be scored")
        return Completion(ids=ids, loss_mask=loss_mask), "".join(s.text for s in segments)

    def _split_side(self, row: Row, side: str, prompt_text: str) -> list[Segment]:
        """Cut a rendered side, after the prompt, into text that the model generates and text that
        it is given.

        Each assistant message follows its generation prompt; the text from there to the message's
        end is scored.
        """
        if self._is_raw:
            return [Segment(text=_content(row[side]), is_scored=True)]
        messages = list(row["prompt"])
        border = prompt_text
        segments: list[Segment] = []
        for message in row[side]:
            is_assistant = message["role"] == "assistant"
            if is_assistant and messages != row["prompt"]:
                opened = self._render(messages, row["tools"], True)
                segments.append(Segment(text=_cut(opened, border, side), is_scored=False))
                border = opened
            messages.append(message)
            closed = self._render(messages, row["tools"], False)
            segments.append(Segment(text=_cut(closed, border, side), is_scored=is_assistant))
            border = closed
        return self._drop_after_end(segments)

    def _drop_after_end(self, segments: list[Segment]) -> list[Segment]:
        """Drop white space that a template writes after the last end-of-turn token.

        Generation stops at that token, so the model is never asked for anything after it.
        """
        end = self._tokenizer.eos_token
        last = segments[-1]
        if not isinstance(end, str) or end not in last.text:
            return segments
        text, _, behind = last.text.rpartition(end)
        if behind.strip():
            return segments
        return [*segments[:-1], Segment(text=text + end, is_scored=last.is_scored)]

    def _render(self, messages: Sequence[Row], tools: str | None, opens_answer: bool) -> str:
        if self._is_raw:
            return _content(messages)
        from jinja2 import TemplateError

        try:
            rendered = self._tokenizer.apply_chat_template(
                [_template_message(message) for message in messages],
                tools=json.loads(tools) if tools else None,
                chat_template=self._template,
                add_generation_prompt=opens_answer,
                tokenize=False,
            )
        except TemplateError as error:
            raise RowRejected("TEMPLATE_REFUSED", "prompt", str(error)) from error
        assert isinstance(rendered, str)
        return rendered

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _end_of_text(self) -> int:
        end = self._tokenizer.eos_token_id
        assert isinstance(end, int)
        return end

    def _refuse_special_tokens(self, row: Row) -> None:
        """Refuse text that would become control tokens, such as <|im_end|> typed by a user."""
        if self._special is None:
            return
        for side in ("prompt", "chosen", "rejected"):
            for position, message in enumerate(row[side]):
                for field in ("content", "reasoning", "tool_calls"):
                    found = self._special.search(message[field] or "")
                    if found:
                        place = f"{side}.{position}.{field}"
                        detail = f"the text holds the special token {found.group()!r}"
                        raise RowRejected("SPECIAL_TOKEN_IN_TEXT", place, detail)

    def _find_merges(
        self,
        prompt_text: str,
        prompt_ids: list[int],
        sides: Mapping[str, tuple[Completion, str]],
    ) -> list[str]:
        """Warn where tokenising prompt and completion in one piece would give other ids."""
        for completion, text in sides.values():
            whole = self._prefix + self._tokenize(prompt_text + text)
            parts = prompt_ids + completion.ids
            if whole != parts[: len(parts) - self._is_raw]:
                return ["TOK_MERGE_AT_BORDER"]
        return []

    def _check_ids(self, prompt_ids: list[int], sides: Mapping[str, list[int]]) -> list[str]:
        """Check ids for faults that a template and a tokenizer cause together.

        Returns:
            Codes of warnings.
        Raises:
            RowRejected: a control token occurs twice.
        """
        tokenizer = self._tokenizer
        bos, eos, unknown = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
        if bos is not None and prompt_ids[:2] == [bos, bos]:
            raise RowRejected("TOK_DOUBLE_BOS", "prompt", f"token {bos} twice")
        warnings = []
        for side, ids in sides.items():
            if eos is not None and ids[-2:] == [eos, eos]:
                raise RowRejected("TOK_DOUBLE_EOS", side, f"token {eos} twice")
        if any(ids[-1] not in self._special_ids for ids in sides.values()):
            warnings.append("TOK_EOS_MISSING")
        if unknown is not None and any(unknown in ids for ids in (prompt_ids, *sides.values())):
            warnings.append("TOK_UNK")
        return warnings

    def _truncate(
        self,
        row: Row,
        prompt_ids: list[int],
        sides: Mapping[str, Completion],
        warnings: list[str],
    ) -> tuple[dict[str, Any], list[str]]:
        kept_prompt = _cut_beginning(
            prompt_ids, self._config.max_prompt_length, bos=self._tokenizer.bos_token_id
        )
        room = self._config.max_length - len(kept_prompt)
        chosen, rejected = (sides[side].ids[:room] for side in ("chosen", "rejected"))
        masks = {side: sides[side].loss_mask[:room] for side in ("chosen", "rejected")}
        truncated = (
            PROMPT_CUT * (len(kept_prompt) < len(prompt_ids))
            + CHOSEN_CUT * (len(chosen) < len(sides["chosen"].ids))
            + REJECTED_CUT * (len(rejected) < len(sides["rejected"].ids))
        )
        if chosen == rejected:
            code = "TOK_IDENTICAL_AFTER_TRUNCATION" if truncated else "TOK_IDENTICAL"
            raise RowRejected(code, "chosen", f"both sides are the same {len(chosen)} tokens")
        for side, mask in masks.items():
            if not any(mask):
                detail = f"nothing that is scored lies within the first {room} tokens"
                raise RowRejected("TOK_NO_COMPLETION", side, detail)
        encoded = {
            **{name: row[name] for name in ("pair_id", "prompt_id")},
            "prompt_ids": kept_prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "chosen_loss_mask": None if all(masks["chosen"]) else masks["chosen"],
            "rejected_loss_mask": None if all(masks["rejected"]) else masks["rejected"],
            "num_prompt_tokens": len(kept_prompt),
            "num_chosen_tokens": len(chosen),
            "num_rejected_tokens": len(rejected),
            "chosen_sequence_id": sequence_id(kept_prompt, chosen),
            "rejected_sequence_id": sequence_id(kept_prompt, rejected),
            "truncated": truncated,
            **{name: row[name] for name in ("weight", "margin", "source", "split")},
        }
        return encoded, warnings + _truncation_warnings(truncated)


def _truncation_warnings(truncated: int) -> list[str]:
    warnings = ["TOK_PROMPT_TRUNCATED"] if truncated & PROMPT_CUT else []
    completions = truncated & (CHOSEN_CUT | REJECTED_CUT)
    if completions == CHOSEN_CUT | REJECTED_CUT:
        warnings.append("TOK_TRUNCATED")
    elif completions:
        warnings.append("TOK_TRUNCATED_ONE_SIDE")
    return warnings


def _cut_beginning(ids: list[int], max_length: int, *, bos: int | None) -> list[int]:
    """Keep the end of a prompt, which holds the question, and a leading BOS token."""
    if len(ids) <= max_length:
        return ids
    if bos is not None and ids[0] == bos and max_length > 1:
        return [bos, *ids[len(ids) - max_length + 1 :]]
    return ids[len(ids) - max_length :]


def _cut(text: str, border: str, side: str) -> str:
    """Return the part of a rendered text after `border`."""
    if not text.startswith(border):
        same = next(
            (i for i, (a, b) in enumerate(zip(text, border, strict=False)) if a != b),
            min(len(text), len(border)),
        )
        detail = (
            f"the template renders the messages before it otherwise when it follows: "
            f"{border[same : same + 60]!r} becomes {text[same : same + 60]!r}"
        )
        raise RowRejected("TOK_PREFIX_MISMATCH", side, detail)
    return text[len(border) :]


def _content(messages: Iterable[Row]) -> str:
    return "".join(message["content"] or "" for message in messages)


def _loses_reasoning(messages: Iterable[Row], text: str) -> bool:
    """Return whether an answer's reasoning is missing from its rendered text."""
    return any((message["reasoning"] or "").strip() not in text for message in messages)


def _template_message(message: Row) -> dict[str, Any]:
    """Return a message as chat templates expect it."""
    given = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in given:
        given["tool_calls"] = json.loads(given["tool_calls"])
    if "reasoning" in given:
        given["reasoning_content"] = given.pop("reasoning")
    return given


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return sorted(
        {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    )


def _match_any(words: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


@dataclass(frozen=True, kw_only=True)
class _Encode:
    """Makes the worker that encodes shards; loads the tokenizer once."""

    source: Folder
    out: StageDir
    tokenizer: TokenizerPin
    template: str
    config: EncodeConfig

    def __call__(self) -> ShardWorker[AlignedShards]:
        from transformers import AutoTokenizer

        path = fetch_tokenizer(self.tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if self.template == "auto" and not tokenizer.chat_template:
            raise ConfigError(
                f"The tokenizer {self.tokenizer.spec} has no chat template. Set "
                "stages.encode.template to a Jinja file, or to none for raw text."
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"The tokenizer {self.tokenizer.spec} has no end-of-text token.")
        encoder = Encoder(tokenizer, self.template, self.config)

        def encode_shard(task: AlignedShards) -> ShardRecord:
            return self._encode(task, encoder)

        return encode_shard

    def _encode(self, task: AlignedShards, encoder: Encoder) -> ShardRecord:
        rows = read_file(self.source, task.records["dedupe"].files["data"])
        reasons: Counter[str] = Counter()
        warnings: Counter[str] = Counter()
        num_tokens = 0
        with self.out.write_shard(task.index, {"data": ENCODED, "rejected": REJECTED}) as shard:
            for batch in rows.to_batches(max_chunksize=_ROWS_AT_ONCE):
                kept, refused = [], []
                for row in batch.to_pylist():
                    try:
                        encoded, codes = encoder.encode_pair(row)
                    except RowRejected as error:
                        refused.append(_rejected_row(row, *error.args))
                        continue
                    warnings.update(codes)
                    num_tokens += encoded["num_prompt_tokens"]
                    num_tokens += encoded["num_chosen_tokens"] + encoded["num_rejected_tokens"]
                    kept.append(encoded)
                shard.write_rows("data", kept)
                shard.write_rows("rejected", refused)
                reasons.update(row["code"] for row in refused)
            counts = Counts(
                num_in=rows.num_rows,
                num_out=shard.num_rows("data"),
                reasons=dict(reasons),
                warnings=dict(warnings),
                more={"num_tokens": num_tokens},
            )
            assert counts.num_in == counts.num_out + counts.num_rejected
            return shard.commit(counts)


def _rejected_row(row: Row, code: str, field: str, detail: str) -> dict[str, Any]:
    return {
        "code": code,
        "codes": [code],
        "field": field,
        "detail": detail[:500],
        **{name: row[name] for name in ("source_file", "source_row", "pair_id")},
    }


def run(config: EncodeConfig, ctx: StageContext) -> StageResult:
    """Render, tokenise and truncate every pair; 1:1 with dedupe's shards."""
    tokenizer, template = ctx.pins["tokenizer"], ctx.pins["template"]
    assert isinstance(tokenizer, TokenizerPin)
    assert isinstance(template, TemplatePin)
    encode = _Encode(
        source=ctx.inputs["dedupe"].folder,
        out=ctx.out,
        tokenizer=tokenizer,
        template=template.text,
        config=config,
    )
    return StageResult(shards=ctx.map_shards(encode, align_shards(ctx.inputs, ["dedupe"])))


def complete(config: EncodeConfig, recipe: RecipeView) -> EncodeConfig:
    """Set the reference's tokenizer, unless one is named; an adapter's own comes first."""
    if config.tokenizer is not None:
        return config
    reference, adapter = recipe.config("score"), recipe.pin("score", "adapter")
    has_own = isinstance(adapter, AdapterPin) and adapter.tokenizer is not None
    return replace(config, tokenizer=reference.adapter if has_own else reference.model)


STAGE = Stage(
    name="encode",
    version=1,
    needs=lambda config: ("dedupe",),
    config=EncodeConfig,
    execution=Execution,
    run=run,
    complete=complete,
    pins={"tokenizer": pin_tokenizer, "template": pin_template},
    codes={**REASONS, **WARNINGS},
    row_name="pairs",
    reads_every_row=True,
    numeric_packages=("transformers", "tokenizers"),
    cost=Cost(
        rate_per_core=500.0,  # Measured: docs/explanation/measurements.md.
        start_seconds=10.0,
        # Bytes a token, measured: docs/explanation/scale.md.
        count_bytes=lambda stage, load: 1.7 * load.num_tokens,
        max_workers=count_aligned_shards,
        measure_lengths=measure_lengths,
    ),
)
