"""Checks of a pair's texts before they are tokenised, and of its ids afterwards."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.encode.template import Row, RowRejected, read_calls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
_TEXT_FIELDS = ("content", "reasoning", "tool_call_id", "name")


def list_control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """List the tokenizer's special tokens as text, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    found = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    return sorted(found, key=lambda token: (-len(token), token))


def list_control_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """List the ids of the tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if token.special} | set(tokenizer.all_special_ids)


def refuse_control_tokens(row: Row, control_tokens: Sequence[str]) -> None:
    """Refuse texts that would become control tokens, such as <|im_end|> typed by a user.

    Raises:
        RowRejected: a text holds a special token of the tokenizer.
    """
    if not control_tokens:
        return
    pattern = re.compile("|".join(map(re.escape, control_tokens)))
    for place, text in _list_texts(row):
        if found := pattern.search(text):
            detail = f"the text holds the special token {found.group()!r}"
            raise RowRejected("SPECIAL_TOKEN_IN_TEXT", place, detail)


def _list_texts(row: Row) -> Iterator[tuple[str, str]]:
    """List all texts of a pair that a template may print, with their places."""
    for side in ("prompt", *SIDES):
        for position, message in enumerate(row[side]):
            for field in _TEXT_FIELDS:
                yield f"{side}.{position}.{field}", message[field] or ""
            if calls := message["tool_calls"]:
                read = json.dumps(read_calls(calls, wraps_calls=False), ensure_ascii=False)
                yield f"{side}.{position}.tool_calls", f"{calls} {read}"
    if tools := row["tools"]:
        yield "tools", f"{tools} {json.dumps(json.loads(tools), ensure_ascii=False)}"


def check_ids(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Sequence[int],
    sides: Mapping[str, Sequence[int]],
    *,
    control_ids: set[int],
    vocab_size: int | None,
) -> list[str]:
    """Check ids for faults that a template, a tokenizer and a model cause together.

    Returns:
        Codes of warnings.
    Raises:
        RowRejected: a control token occurs twice, or the model has no embedding of a token.
    """
    for field, ids in (("prompt", prompt_ids), *sides.items()):
        if vocab_size is not None and (beyond := max(ids, default=0)) >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(beyond)
            detail = f"token {beyond} ({token!r}), but the model has {vocab_size:,} embeddings"
            raise RowRejected("TOK_OUT_OF_VOCABULARY", field, detail)
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    if bos is not None and list(prompt_ids[:2]) == [bos, bos]:
        raise RowRejected("TOK_DOUBLE_BOS", "prompt", f"token {bos} twice")
    for side, ids in sides.items():
        if len(ids) > 1 and ids[-1] == ids[-2] and ids[-1] in control_ids:
            raise RowRejected("TOK_DOUBLE_EOS", side, f"token {ids[-1]} twice")
    warnings = []
    if any(ids[-1] not in control_ids for ids in sides.values()):
        warnings.append("TOK_EOS_MISSING")
    if unknown is not None and any(unknown in ids for ids in (prompt_ids, *sides.values())):
        warnings.append("TOK_UNK")
    return warnings
