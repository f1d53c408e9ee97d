"""Config of encode, its pinned template, and its codes of rejected rows and warnings."""

from pathlib import Path

import msgspec

from schemas.config import config_class
from schemas.errors import ConfigError
from schemas.ids import digest

TEMPLATE_WORDS = ("auto", "none")
"""Values of `template` that are not a file."""

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
            "Write auto, none, or the path of a Jinja chat template."
        ) from error
