"""Rules on the texts of a pair: length, control characters, special tokens, turn markers."""

import re

from stages.validate.findings import MISSING_WORDS
from stages.validate.messages import Message
from stages.validate.rules.pair_view import PairView
from stages.validate.rules.rule import Spots, Thresholds

_CONTROL_BYTES = bytes(code for code in range(32) if chr(code) not in "\t\n\r")
# In UTF-8 all of U+202A to 202E and U+2066 to 2069 begin with the same byte: a fast search.
_BIDI_BYTES = re.compile(rb"\xe2(?:\x80[\xaa-\xae]|\x81[\xa6-\xa9])")
_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f]")
_BIDI_OVERRIDE = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
_CLIMBS = re.compile(r"(?:\A|[/\\])\.\.(?:[/\\]|\Z)")
_MISSING_CHARS = 10
_SPECIAL_TOKEN = re.compile(
    r"<[|\uff5c][^<>|\uff5c\n]{1,40}[|\uff5c]>"  # <|im_end|>; U+FF5C is DeepSeek's bar
    r"|</?s>|<(?:bos|eos|pad|unk|(?:start|end)_of_turn|extra_id_\d+)>"
    r"|\[/?INST\]|<</?SYS>>"
)
_MEDIA_PLACEHOLDER = re.compile(r"<(?:image|audio|video)(?:[ _-]?\d+)?>")
_TURN_MARKER = re.compile(
    r"(?:\A|\n\n)(?:Human|Assistant):"
    r"|^###? ?(?:Instruction|Response|Human|Assistant|User)(?::|[ \t]*$)",
    re.MULTILINE,
)


def may_be_too_long(pair: PairView, thresholds: Thresholds) -> bool:
    return max(map(len, pair.texts)) > thresholds.max_text_chars


def find_long_text(pair: PairView, thresholds: Thresholds) -> Spots:
    for path, text in pair.located_texts():
        if len(text) > thresholds.max_text_chars:
            yield path, f"{len(text):,} characters, at most {thresholds.max_text_chars:,}"


def has_nul(pair: PairView, _: Thresholds) -> bool:
    return any("\0" in text for text in pair.texts)


def find_nul(pair: PairView, _: Thresholds) -> Spots:
    for path, text in pair.located_texts():
        if "\0" in text:
            yield path, f"NUL at {text.index(chr(0))}"


def has_controls(pair: PairView, _: Thresholds) -> bool:
    return len(pair.data.translate(None, _CONTROL_BYTES)) != len(pair.data)


def find_control_chars(pair: PairView, _: Thresholds) -> Spots:
    return _find_character(pair, _CONTROL)


def may_be_missing(pair: PairView, _: Thresholds) -> bool:
    return any(_says_missing(messages) for _, messages in _list_sides(pair))


def find_missing_as_text(pair: PairView, _: Thresholds) -> Spots:
    for side, messages in _list_sides(pair):
        if _says_missing(messages):
            yield f"{side}.{len(messages) - 1}.content", ascii(messages[-1]["content"])


def _list_sides(pair: PairView) -> tuple[tuple[str, list[Message]], ...]:
    return ("prompt", pair.draft.prompt), *pair.sides()


def _says_missing(messages: list[Message]) -> bool:
    text = (messages[-1]["content"] or "") if messages else ""
    return len(text) <= _MISSING_CHARS and text.strip().lower() in MISSING_WORDS


def may_have_unsafe_name(pair: PairView, thresholds: Thresholds) -> bool:
    return not (
        _is_surely_safe(pair.draft.source, thresholds)
        and _is_surely_safe(pair.draft.source_id, thresholds)
    )


def find_unsafe_name(pair: PairView, thresholds: Thresholds) -> Spots:
    """Find names that are unsafe to list, or to use in paths.

    Slashes are allowed: they are in the names of hub data sets and in ids that are URLs. No path is
    built from either column here; the rule protects programs that do so.
    """
    for field in ("source", "source_id"):
        name = getattr(pair.draft, field)
        if name is None:
            continue
        if len(name.encode()) > thresholds.max_name_bytes:
            limit = thresholds.max_name_bytes
            yield field, f"{len(name.encode()):,} bytes, at most {limit:,}: {name[:80]!a}"
        elif not name.isprintable() or _CLIMBS.search(name):
            yield field, ascii(name)


def may_have_special_tokens(pair: PairView, _: Thresholds) -> bool:
    return "<" in pair.text or "[" in pair.text


def find_special_tokens(pair: PairView, _: Thresholds) -> Spots:
    for path, text in pair.located_texts():
        if found := _SPECIAL_TOKEN.search(text):
            yield path, f"{found[0]} at {found.start()}"


def find_media_placeholders(pair: PairView, _: Thresholds) -> Spots:
    """Find placeholders of media, which are also HTML tags; a row with media is already refused."""
    for path, text in pair.located_texts():
        if found := _MEDIA_PLACEHOLDER.search(text):
            yield path, f"{found[0]} at {found.start()}"


def may_have_turn_markers(pair: PairView, _: Thresholds) -> bool:
    text = pair.text
    return "Human:" in text or "Assistant:" in text or "##" in text


def find_turn_markers(pair: PairView, _: Thresholds) -> Spots:
    for path, message in pair.located_messages():
        if found := _TURN_MARKER.search(message["content"] or ""):
            yield f"{path}.content", f"{found[0]!a} at {found.start()}"


def has_bidi(pair: PairView, _: Thresholds) -> bool:
    return not pair.text.isascii() and _BIDI_BYTES.search(pair.data) is not None


def find_bidi_override(pair: PairView, _: Thresholds) -> Spots:
    return _find_character(pair, _BIDI_OVERRIDE)


def has_replacement_char(pair: PairView, _: Thresholds) -> bool:
    return "\ufffd" in pair.text


def find_replacement_char(pair: PairView, _: Thresholds) -> Spots:
    for path, text in pair.located_texts():
        if "\ufffd" in text:
            yield path, f"U+FFFD at {text.index(chr(0xFFFD))}"


def _find_character(pair: PairView, pattern: re.Pattern[str]) -> Spots:
    for path, text in pair.located_texts():
        if found := pattern.search(text):
            yield path, f"U+{ord(found[0]):04X} at {found.start()}"


def _is_surely_safe(name: str | None, thresholds: Thresholds) -> bool:
    # A character takes at most four bytes.
    return name is None or (
        4 * len(name) <= thresholds.max_name_bytes and name.isprintable() and ".." not in name
    )
