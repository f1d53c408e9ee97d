"""Encoding of one pair: its text becomes ids, which are checked and truncated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from schemas.ids import sequence_id
from stages.encode.checks import (
    SIDES,
    check_ids,
    list_control_ids,
    list_control_tokens,
    refuse_control_tokens,
)
from stages.encode.config import TEMPLATE_WORDS, EncodeConfig
from stages.encode.rendering import SplitPair, split_raw, split_rendered
from stages.encode.segments import Segment, TurnEnds
from stages.encode.template import ChatTemplate, Row, RowRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_CUT, CHOSEN_CUT, REJECTED_CUT = 1, 2, 4


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One side's tokens before truncation."""

    ids: list[int]
    loss_mask: list[bool]
    num_added: int
    """Tokens at its end that its text does not hold: the end of raw text."""


class Encoder:
    """Turns rows of the pairs table into rows of the encoded table.

    Args:
        tokenizer: a fast tokenizer.
        template: one of TEMPLATE_WORDS, or a chat template's text.
        config: lengths, and what the template is given.
    Raises:
        ConfigError: the template cannot be used; see ChatTemplate.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: str, config: EncodeConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._is_rendered = template == "prerendered"
        self._template: ChatTemplate | None = None
        if template not in ("none", "prerendered"):
            text = None if template in TEMPLATE_WORDS else template
            self._template = ChatTemplate(tokenizer, text, config)
        self._control_tokens = list_control_tokens(tokenizer)
        self._control_ids = list_control_ids(tokenizer)
        self._ends = TurnEnds(self._control_tokens)
        # A template writes BOS itself; raw text gets the tokens that the tokenizer adds.
        is_raw = self._template is None
        wrapped = tokenizer("", add_special_tokens=True)["input_ids"] if is_raw else []
        self._prefix = [token for token in wrapped if token != tokenizer.eos_token_id]

    @property
    def num_dates(self) -> int:
        """How often the template has printed the date."""
        return 0 if self._template is None else self._template.num_dates

    def encode_pair(self, row: Row) -> tuple[dict[str, Any], list[str]]:
        """Encode one pair.

        Args:
            row: a row of the pairs table.
        Returns:
            A row of the encoded table, and codes of warnings.
        Raises:
            RowRejected: it cannot be encoded; carries (code, field, detail).
        """
        if not self._is_rendered:
            refuse_control_tokens(row, self._control_tokens)
        if self._template is None:
            pair = split_raw(row, self._ends, is_rendered=self._is_rendered)
        else:
            pair = split_rendered(row, self._template, self._ends)
        text_ids = self._tokenize(pair.prompt)
        has_prefix = text_ids[: len(self._prefix)] == self._prefix
        prompt_ids = text_ids if has_prefix else self._prefix + text_ids
        sides = {side: self._encode_side(side, pair.sides[side]) for side in SIDES}
        warnings = self._find_merges(pair, text_ids, sides)
        warnings += check_ids(
            self._tokenizer,
            prompt_ids,
            {side: completion.ids for side, completion in sides.items()},
            control_ids=self._control_ids,
            vocab_size=self._config.vocab_size,
        )
        return self._truncate(row, prompt_ids, sides, [*warnings, *pair.warnings])

    def _encode_side(self, side: str, segments: Sequence[Segment]) -> Completion:
        ids: list[int] = []
        loss_mask: list[bool] = []
        for is_scored, pieces in groupby(segments, key=lambda segment: segment.is_scored):
            piece = self._tokenize("".join(segment.text for segment in pieces))
            ids += piece
            loss_mask += [is_scored] * len(piece)
        lacks_end = self._template is None and not (ids and ids[-1] in self._control_ids)
        if lacks_end:
            ids.append(self._end_of_text())
            loss_mask.append(True)
        if not any(loss_mask):
            raise RowRejected("TOK_NO_COMPLETION", side, "no token of it would be scored")
        return Completion(ids=ids, loss_mask=loss_mask, num_added=int(lacks_end))

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _end_of_text(self) -> int:
        end = self._tokenizer.eos_token_id
        assert isinstance(end, int)
        return end

    def _find_merges(
        self, pair: SplitPair, text_ids: list[int], sides: Mapping[str, Completion]
    ) -> list[str]:
        """Warn where tokenising prompt and completion in one piece would give other ids."""
        for side, completion in sides.items():
            whole = self._tokenize(pair.prompt + pair.side_text(side))
            if whole != text_ids + completion.ids[: len(completion.ids) - completion.num_added]:
                return ["TOK_MERGE_AT_BORDER"]
        return []

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
        chosen, rejected = (sides[side].ids[:room] for side in SIDES)
        masks = {side: sides[side].loss_mask[:room] for side in SIDES}
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
