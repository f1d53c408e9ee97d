"""Encoding of one pair: rendering, cutting into prompt and completions, tokenising, truncation."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schemas.ids import sequence_id
from stages.encode.config import TEMPLATE_WORDS, EncodeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_CUT, CHOSEN_CUT, REJECTED_CUT = 1, 2, 4

Row = Mapping[str, Any]


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
        self._template = None if template in TEMPLATE_WORDS else template
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
