"""Rules on roles, empty texts, tool calls, scores and weights."""

import json
import math
import re
import unicodedata
from functools import lru_cache
from itertools import pairwise

from stages.validate.formats.pair_drafts import PairDraft
from stages.validate.messages import Message, are_same_but_content
from stages.validate.rules.pair_view import PairView, Roles
from stages.validate.rules.rule import Spots, Thresholds

_VISIBLE = re.compile(r"[^\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_FLOAT32_TINY, _FLOAT32_MAX = 1.2e-38, 3.4e38


def may_be_empty(pair: PairView, _: Thresholds) -> bool:
    """Return False if prompt and answers begin with a visible character."""
    draft = pair.draft
    return not (
        draft.prompt
        and _begins_visibly(draft.prompt[-1]["content"] or "")
        and _begins_visibly(pair.chosen_text)
        and _begins_visibly(pair.rejected_text)
        and len(draft.chosen) == len(draft.rejected) == 1
    )


def _begins_visibly(text: str) -> bool:
    return "!" <= text[:1] <= "~" or _VISIBLE.match(text) is not None


def find_empty_prompt(pair: PairView, _: Thresholds) -> Spots:
    prompt = pair.draft.prompt
    if not prompt:
        yield "prompt", "no messages"
    elif prompt[-1]["role"] == "user" and _is_blank(prompt[-1]):
        yield "prompt", f"found {ascii(prompt[-1]['content'])[:80]}"


def find_empty_chosen(pair: PairView, _: Thresholds) -> Spots:
    return _find_empty_answer(pair.draft.chosen, "chosen")


def find_empty_rejected(pair: PairView, _: Thresholds) -> Spots:
    return _find_empty_answer(pair.draft.rejected, "rejected")


def has_role_faults(pair: PairView, _: Thresholds) -> bool:
    return _has_role_faults(pair.roles)


def find_late_system(pair: PairView, _: Thresholds) -> Spots:
    return _find_late_system(pair.roles)


def find_unanswerable_prompt(pair: PairView, _: Thresholds) -> Spots:
    return _find_unanswerable_prompt(pair.roles)


def find_wrong_first_role(pair: PairView, _: Thresholds) -> Spots:
    return _find_wrong_first_role(pair.roles)


def find_wrong_last_role(pair: PairView, _: Thresholds) -> Spots:
    return _find_wrong_last_role(pair.roles)


def find_repeated_role(pair: PairView, _: Thresholds) -> Spots:
    return _find_repeated_role(pair.roles)


def has_tool_results(pair: PairView, _: Thresholds) -> bool:
    roles = pair.roles
    return "tool" in roles.prompt or "tool" in roles.chosen or "tool" in roles.rejected


def find_orphan_results(pair: PairView, _: Thresholds) -> Spots:
    """Find tool results that do not follow their call directly or after other results.

    If both the result and the calls before it have ids, the result must have one of theirs.
    """
    for side, answer in pair.sides():
        prompt = [(f"prompt.{at}", message) for at, message in enumerate(pair.draft.prompt)]
        conversation = prompt + [(f"{side}.{at}", message) for at, message in enumerate(answer)]
        is_open, ids = False, set[str]()
        for path, message in conversation:
            if message["role"] != "tool":
                calls = json.loads(message["tool_calls"] or "[]")
                is_open = bool(calls)
                ids.update(call["id"] for call in calls if isinstance(call.get("id"), str))
            elif path.startswith("prompt") and side != "chosen":
                continue  # Reported once, for the chosen side.
            elif not is_open:
                yield path, "no call before it"
            elif ids and message["tool_call_id"] not in (None, *ids):
                yield f"{path}.tool_call_id", f"no call has the id {message['tool_call_id']!a}"


def may_be_equal(pair: PairView, _: Thresholds) -> bool:
    return pair.chosen_text == pair.rejected_text


def find_equal_answers(pair: PairView, _: Thresholds) -> Spots:
    chosen, rejected = pair.draft.chosen, pair.draft.rejected
    if chosen and len(chosen) == len(rejected) and all(map(_are_equal, chosen, rejected)):
        yield "rejected", ascii(rejected[-1]["content"])[:200]


def has_scores(pair: PairView, _: Thresholds) -> bool:
    draft = pair.draft
    return not (draft.margin is draft.score_chosen is draft.score_rejected is None)


def find_tie(pair: PairView, _: Thresholds) -> Spots:
    if pair.draft.margin == 0:
        yield "score_chosen", _describe_scores(pair.draft)


def find_contradiction(pair: PairView, _: Thresholds) -> Spots:
    if pair.draft.margin is not None and pair.draft.margin < 0:
        yield "score_chosen", _describe_scores(pair.draft)


def find_nonfinite_score(pair: PairView, _: Thresholds) -> Spots:
    for field in ("score_chosen", "score_rejected", "margin"):
        score = getattr(pair.draft, field)
        if score is not None and not math.isfinite(score):
            yield field, str(score)


def has_weight(pair: PairView, _: Thresholds) -> bool:
    return pair.draft.weight != 1.0


def find_bad_weight(pair: PairView, _: Thresholds) -> Spots:
    if not _FLOAT32_TINY <= pair.draft.weight <= _FLOAT32_MAX:
        yield "weight", str(pair.draft.weight)


def has_declared_tools(pair: PairView, _: Thresholds) -> bool:
    return pair.draft.tools is not None and not pair.is_plain


def find_unknown_calls(pair: PairView, _: Thresholds) -> Spots:
    """Find calls of undeclared tools.

    Rows that declare no tools pass, because many data sets list them in the system text.
    """
    if pair.draft.tools is None:
        return
    declared = {_name_of(tool) for tool in json.loads(pair.draft.tools)}
    for path, message in pair.located_messages():
        for at, call in enumerate(json.loads(message["tool_calls"] or "[]")):
            if _name_of(call) not in declared:
                yield f"{path}.tool_calls.{at}", f"{_name_of(call)!a} is not declared"


def _name_of(tool: dict[str, object]) -> object:
    """Return a tool's or a call's name, with or without OpenAI's wrapper."""
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else tool.get("name")


@lru_cache(maxsize=4096)
def _has_role_faults(roles: Roles) -> bool:
    return any(next(find(roles), None) is not None for find in _ROLE_CHECKS)


def _find_late_system(roles: Roles) -> Spots:
    for side, speakers in zip(roles._fields, roles, strict=True):
        for at, role in enumerate(speakers):
            if role == "system" and (side, at) != ("prompt", 0):
                yield f"{side}.{at}", "a system message after the start"


def _find_unanswerable_prompt(roles: Roles) -> Spots:
    if roles.prompt and roles.prompt[-1] not in ("user", "tool"):
        yield f"prompt.{len(roles.prompt) - 1}.role", roles.prompt[-1]


def _find_wrong_first_role(roles: Roles) -> Spots:
    for side, speakers in (("chosen", roles.chosen), ("rejected", roles.rejected)):
        if speakers and speakers[0] != "assistant":
            yield f"{side}.0.role", speakers[0]


def _find_wrong_last_role(roles: Roles) -> Spots:
    for side, speakers in (("chosen", roles.chosen), ("rejected", roles.rejected)):
        if speakers and speakers[-1] != "assistant":
            yield f"{side}.{len(speakers) - 1}.role", speakers[-1]


def _find_repeated_role(roles: Roles) -> Spots:
    """Find two users or two assistants in a row; several tool results in a row are allowed."""
    prompt = [(f"prompt.{at}", role) for at, role in enumerate(roles.prompt)]
    for side, speakers in (("chosen", roles.chosen), ("rejected", roles.rejected)):
        located = prompt + [(f"{side}.{at}", role) for at, role in enumerate(speakers)]
        for (_, before), (path, role) in pairwise(located):
            if before == role in ("user", "assistant"):
                yield path, f"{role} after {before}"


_ROLE_CHECKS = (
    _find_late_system,
    _find_unanswerable_prompt,
    _find_wrong_first_role,
    _find_wrong_last_role,
    _find_repeated_role,
)


def _find_empty_answer(messages: list[Message], side: str) -> Spots:
    if not messages:
        yield side, "no messages"
    elif messages[-1]["tool_calls"] is None and _is_blank(messages[-1]):
        yield side, f"found {ascii(messages[-1]['content'])[:80]}"


def _are_equal(chosen: Message, rejected: Message) -> bool:
    texts = [unicodedata.normalize("NFC", m["content"] or "").strip() for m in (chosen, rejected)]
    return texts[0] == texts[1] and are_same_but_content(chosen, rejected)


def _describe_scores(draft: PairDraft) -> str:
    return f"chosen {draft.score_chosen}, rejected {draft.score_rejected}, margin {draft.margin}"


def _is_blank(message: Message) -> bool:
    return _VISIBLE.search(message["content"] or "") is None
