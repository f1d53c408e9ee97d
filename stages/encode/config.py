"""Config of encode, its pinned template, and its codes of rejected rows and warnings."""

import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from pydantic import AfterValidator, Field, JsonValue

from schemas.config import config_class
from schemas.errors import ConfigError
from schemas.ids import digest

TEMPLATE_WORDS = ("auto", "none", "prerendered")
"""Values of `template` that are not a file."""

REASONS = {
    "TEMPLATE_REFUSED": "The chat template cannot render the messages.",
    "TOOL_CALL_LOST": "The chat template leaves out a tool call, and its message has no text.",
    "TOK_PREFIX_MISMATCH": "The rendered conversation does not begin with the rendered prompt.",
    "SPECIAL_TOKEN_IN_TEXT": "A text contains one of the tokenizer's own control tokens.",
    "TOK_OUT_OF_VOCABULARY": "A token id is beyond the model's embedding.",
    "TOK_DOUBLE_BOS": "The prompt begins with two BOS tokens: template and tokenizer both add one.",
    "TOK_DOUBLE_EOS": "An answer ends with the same control token twice.",
    "TOK_NO_COMPLETION": "An answer has no token to score.",
    "TOK_IDENTICAL": "Both answers are the same tokens.",
    "TOK_IDENTICAL_AFTER_TRUNCATION": "Both answers are the same tokens after truncation.",
}
"""Meanings of the codes that reject a pair."""

WARNINGS = {
    "REASONING_NOT_RENDERED": "The chat template leaves out an answer's reasoning.",
    "TOOL_CALLS_NOT_RENDERED": "The chat template leaves out a tool call beside a text.",
    "TOOLS_NOT_RENDERED": "The chat template leaves out a tool definition.",
    "TOK_MERGE_AT_BORDER": "Tokenising prompt and answer in one piece would give other tokens.",
    "TOK_EOS_MISSING": "An answer does not end with a special token: nothing teaches it to stop.",
    "TOK_UNK": "A text has characters that the tokenizer does not know.",
    "TOK_PROMPT_TRUNCATED": "The prompt lost its beginning.",
    "TOK_TRUNCATED": "Both answers lost their ends.",
    "TOK_TRUNCATED_ONE_SIDE": "Only one of the answers lost its end.",
}
"""Meanings of the codes that warn about a kept pair."""

_OTHER_TEMPLATE = "Set stages.encode.template to a Jinja file that renders such messages"

ADVICE = {
    "TEMPLATE_REFUSED": f"{_OTHER_TEMPLATE}, or change the data.",
    "TOOL_CALL_LOST": f"{_OTHER_TEMPLATE}: this one knows no tool calls.",
    "TOK_PREFIX_MISMATCH": "Set the variable (stages.encode.template_kwargs) that the example "
    "names, or stages.encode.template to a Jinja file whose rendering of an answer begins with its "
    "generation prompt.",
    "SPECIAL_TOKEN_IN_TEXT": "Set stages.encode.template to prerendered if the texts are rendered "
    "already. Otherwise such a text could end a turn or open another.",
    "TOK_OUT_OF_VOCABULARY": "Set stages.encode.tokenizer to the model's own tokenizer, or name a "
    "model whose embedding has a row for each of its tokens.",
    "TOK_DOUBLE_BOS": "Let either the template or the tokenizer add the BOS token.",
    "TOK_IDENTICAL_AFTER_TRUNCATION": "Raise stages.encode.max_length.",
    "TOK_NO_COMPLETION": "Raise stages.encode.max_length if answers were cut.",
}
"""What to do about a code that rejects many pairs."""

_TAKEN_KWARGS = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
    }
)


def _refuse_taken(kwargs: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Refuse variables that are set from elsewhere: from the row, the tokenizer or the config."""
    if taken := sorted(_TAKEN_KWARGS & set(kwargs)):
        raise ValueError(
            f"{', '.join(taken)} cannot be set: encode gives it to the template itself"
        )
    if "strftime_now" in kwargs:
        raise ValueError("strftime_now cannot be set: it prints stages.encode.template_date")
    return kwargs


@config_class
class EncodeConfig:
    """How messages become token ids."""

    tokenizer: str | None = None
    """Tokenizer: Hugging Face id, folder or `sample:` name; absent = that of stages.score.model."""
    template: str = "auto"
    """Chat template: auto = the tokenizer's own, a Jinja file, none = contents as raw text, or
    prerendered = contents are texts that a template has rendered, with their special tokens."""
    template_kwargs: Annotated[dict[str, JsonValue], AfterValidator(_refuse_taken)] = Field(
        default_factory=dict
    )
    """Variables of the chat template, such as `{enable_thinking: false}`."""
    template_date: datetime.date = datetime.date(2024, 7, 26)
    """Date that the template prints as today's, so that ids do not depend on the day."""
    max_length: int = 1024
    """Largest number of tokens of prompt and completion together; longer completions lose their
    end."""
    max_prompt_length: int = 512
    """Largest number of tokens of the prompt; longer prompts lose their beginning (a BOS token
    stays)."""
    max_reject_fraction: float = Field(default=0.1, ge=0, le=1)
    """Largest share of rejected rows, 0 to 1; above it the stage fails."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Number of token ids that the model has embeddings for; absent = as in its config.json, with
    the model's own tokenizer."""

    def __post_init__(self) -> None:
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError("max_prompt_length must be above 0 and below max_length")
        if self.template_kwargs and self.is_raw:
            raise ValueError(f"template_kwargs have no meaning with template: {self.template}")

    @property
    def is_raw(self) -> bool:
        """Whether the contents are the text, without a chat template."""
        return self.template in ("none", "prerendered")


class TemplatePin(msgspec.Struct, frozen=True):
    """A chat template pinned to its content."""

    text: str
    """One of TEMPLATE_WORDS, or the template itself."""

    def identity(self) -> str:
        """Return what is hashed: the word, or the template's digest."""
        return self.text if self.text in TEMPLATE_WORDS else digest(self.text)


def pin_template(template: str) -> TemplatePin:
    """Read the template that a config names.

    Raises:
        ConfigError: it names a file that cannot be read.
    """
    if template in TEMPLATE_WORDS:
        return TemplatePin(template)
    try:
        return TemplatePin(Path(template).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"stages.encode.template: {template} cannot be read ({error}). "
            f"Write {', '.join(TEMPLATE_WORDS)}, or the path of a Jinja chat template."
        ) from error
