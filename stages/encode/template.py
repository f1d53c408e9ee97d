"""Rendering of messages by a chat template, in the shapes that templates read."""

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from schemas.errors import ConfigError
from stages.encode.config import EncodeConfig

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
"""A row of the pairs table, or a message in it."""

THOUGHT_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Names under which templates read an answer's thought, the most frequent first."""

# transformers' own block, which plain Jinja does not know; its contents are rendered as they are.
_GENERATION_TAGS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


class RowRejected(Exception):
    """A row cannot be encoded; carries (code, field, detail)."""


BareContent = Literal["given", "absent", "null", "empty"]
_BARE_CONTENTS: tuple[BareContent, ...] = ("given", "absent", "null", "empty")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shape of messages. Templates differ in which of them they can render."""

    bare_content: BareContent = "given"
    """Content of a message that has tool calls and no text; given = null is left out."""
    wraps_calls: bool = False
    """Whether every tool call is made {type: function, function: {name, arguments}}."""
    has_empty_thought: bool = False
    """Whether an answer without a thought gets an empty one."""


def list_shapes(*, has_calls: bool, reads_thoughts: bool) -> list[Shape]:
    """List the shapes of a pair to try, in order; the first that a template renders whole is used.

    The first is the data's own; the others say the same in another way.
    """
    shapes = [Shape()]
    if has_calls:
        shapes = [
            Shape(bare_content=content, wraps_calls=wraps_calls)
            for wraps_calls in (False, True)
            for content in _BARE_CONTENTS
        ]
    if reads_thoughts:
        shapes += [replace(shape, has_empty_thought=True) for shape in shapes]
    return shapes


class Arguments(dict[str, Any]):
    """Arguments of a tool call: an object that prints as JSON text.

    Templates take arguments as an object (transformers' shape), which they walk through or give to
    `tojson`, or as JSON text (OpenAI's shape), which they print or concatenate. Printing a plain
    dict gives Python's notation, and concatenating it fails.
    """

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class ChatTemplate:
    """A tokenizer's chat template, with the variables and the date of a config.

    Args:
        tokenizer: whose special tokens and, unless another is given, whose template are used.
        text: the template; None = the tokenizer's own.
        config: variables, date, and the template's name for messages.
    Raises:
        ConfigError: the template is not Jinja, or reads a variable of the config nowhere.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", text: str | None, config: EncodeConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._config = config
        self._name = "the tokenizer's chat template" if text is None else config.template
        self._trees = [_parse(source, self._name) for source in _list_sources(tokenizer, text)]
        self._refuse_unread_kwargs()
        self._thought_name = self._find_thought_name()
        self._advice: dict[bool, str] = {}
        self.num_dates = 0
        """How often a rendering has printed the date."""

    def render(
        self,
        messages: Sequence[Row],
        tools: str | None,
        *,
        opens_answer: bool,
        field: str,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages as transformers does.

        Args:
            messages: in the shape that the template is to read; see `shape_message`.
            tools: JSON text of a list.
            opens_answer: whether the generation prompt follows.
            field: what is rendered, for the rejected row.
            kwargs: more variables than those of the config.
        Raises:
            RowRejected: the template raised an exception.
        """
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=json.loads(tools) if tools else None,
                chat_template=self._text,
                add_generation_prompt=opens_answer,
                tokenize=False,
                strftime_now=self._print_date,
                **self._config.template_kwargs,
                **(kwargs or {}),
            )
        except MemoryError:
            raise
        # A template is a program: it raises whatever its operations on this row's values raise.
        except Exception as error:
            detail = f"{self._name} raised {type(error).__name__}: {error}"
            raise RowRejected("TEMPLATE_REFUSED", field, detail) from error
        assert isinstance(rendered, str)
        return rendered

    def shape_message(self, message: Row, shape: Shape) -> dict[str, Any]:
        """Return a message of the pairs table as the template is given it."""
        given = {key: value for key, value in message.items() if value is not None}
        if "tool_calls" in given:
            given["tool_calls"] = read_calls(given["tool_calls"], wraps_calls=shape.wraps_calls)
            if not given.get("content"):
                _shape_bare_content(given, shape)
        thought = given.pop("reasoning", None)
        if thought is None and shape.has_empty_thought and message["role"] == "assistant":
            thought = ""
        if thought is not None:
            self._put_thought(given, thought)
        return given

    @property
    def reads_thoughts(self) -> bool:
        """Whether a message has a field for its thought."""
        return self._thought_name is not None

    def advise(self, *, has_thought: bool) -> str:
        """Name the setting with which a rendered answer begins with the generation prompt.

        Args:
            has_thought: whether an answer with a thought or one without is meant.
        Returns:
            A sentence with a full stop before it; empty where a plain answer needs nothing.
        """
        if has_thought not in self._advice:
            self._advice[has_thought] = self._find_advice(has_thought)
        return self._advice[has_thought]

    def _find_advice(self, has_thought: bool) -> str:
        if self._fits({}, has_thought):
            return ""
        for name in sorted(self._list_variables() - set(self._config.template_kwargs)):
            if "think" in name or "reason" in name:
                for value in (False, True):
                    if self._fits({name: value}, has_thought):
                        setting = f"{{{name}: {str(value).lower()}}}"
                        return f". Set stages.encode.template_kwargs: {setting}"
        return (
            ". No variable of the template changes that: set stages.encode.template to another one"
        )

    def _fits(self, kwargs: Mapping[str, Any], has_thought: bool) -> bool:
        """Return whether the rendering of an answer begins with the rendered prompt."""
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "b"}
        if has_thought:
            self._put_thought(answer, "c")
        try:
            prompt = self.render([question], None, opens_answer=True, field="", kwargs=kwargs)
            whole = self.render(
                [question, answer], None, opens_answer=False, field="", kwargs=kwargs
            )
        except RowRejected:
            return False
        return whole.startswith(prompt)

    def _print_date(self, format: str) -> str:
        self.num_dates += 1
        date = datetime.datetime.combine(self._config.template_date, datetime.time())
        return date.strftime(format)

    def _list_variables(self) -> set[str]:
        from jinja2 import meta

        return {name for tree in self._trees for name in meta.find_undeclared_variables(tree)}

    def _refuse_unread_kwargs(self) -> None:
        read = self._list_variables()
        for name in self._config.template_kwargs:
            if name not in read:
                raise ConfigError(
                    f"stages.encode.template_kwargs.{name}: {self._name} reads no such variable. "
                    f"It reads {', '.join(sorted(read))}."
                )

    def _find_thought_name(self) -> str | None:
        """Return the name under which the template reads a message's thought."""
        read = {name for tree in self._trees for name in _list_keys(tree)}
        return next((name for name in THOUGHT_NAMES if name in read), None)

    def _put_thought(self, message: dict[str, Any], thought: str) -> None:
        if self._thought_name is not None:
            message[self._thought_name] = thought
        elif thought and self._reads_inline_thoughts:
            message["content"] = inline_thought(thought, message.get("content") or "")

    @functools.cached_property
    def _reads_inline_thoughts(self) -> bool:
        return any("</think>" in source for source in _list_sources(self._tokenizer, self._text))


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in the shape that a template is to read, with the tools that they may call."""

    template: ChatTemplate
    messages: tuple[Row, ...]
    tools: str | None
    """JSON text of a list."""
    field: str
    """What is rendered, for rejected rows."""

    def follow_with(self, messages: Sequence[Row], *, field: str) -> "Conversation":
        """Return the conversation with more messages."""
        return replace(self, messages=(*self.messages, *messages), field=field)

    def render(self, *, opens_answer: bool) -> str:
        """Render it, with or without the generation prompt; see `ChatTemplate.render`."""
        return self.template.render(
            self.messages, self.tools, opens_answer=opens_answer, field=self.field
        )


def inline_thought(thought: str, content: str) -> str:
    """Write a thought before an answer, in the notation that models share."""
    return f"<think>\n{thought}\n</think>\n\n{content}"


def read_calls(text: str, *, wraps_calls: bool) -> list[Any]:
    """Read tool calls from JSON text; arguments become objects that print as JSON text."""
    return [_shape_call(call, wraps_calls) for call in json.loads(text)]


def _shape_call(call: Any, wraps_calls: bool) -> Any:
    if not isinstance(call, dict):
        return call
    is_wrapped = isinstance(call.get("function"), dict)
    function = {**(call["function"] if is_wrapped else call)}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function["arguments"] = _read_arguments(arguments)
    elif isinstance(arguments, dict):
        function["arguments"] = Arguments(arguments, json.dumps(arguments, ensure_ascii=False))
    if is_wrapped:
        return {**({"type": "function"} if wraps_calls else {}), **call, "function": function}
    if not wraps_calls:
        return function
    outer = {key: function.pop(key) for key in ("id", "type") if key in function}
    return {"type": "function", **outer, "function": function}


def _read_arguments(text: str) -> Any:
    """Read arguments given as JSON text; what is no object stays text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return Arguments(value, text) if isinstance(value, dict) else text


def _shape_bare_content(message: dict[str, Any], shape: Shape) -> None:
    if shape.bare_content == "absent":
        message.pop("content", None)
    elif shape.bare_content == "null":
        message["content"] = None
    elif shape.bare_content == "empty":
        message["content"] = ""


def _list_sources(tokenizer: "PreTrainedTokenizerBase", text: str | None) -> list[str]:
    """List the texts of a template; a tokenizer may have several, by name."""
    if text is not None:
        return [text]
    own = tokenizer.chat_template
    return list(own.values()) if isinstance(own, dict) else [own]


def _parse(source: str, name: str) -> "nodes.Template":
    from jinja2 import Environment, TemplateSyntaxError

    environment = Environment(  # Parses only; transformers renders, in its sandbox.
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        return environment.parse(_GENERATION_TAGS.sub("", source))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"stages.encode.template: {name} is not a Jinja template (line {error.lineno}: "
            f"{error.message})."
        ) from error


def _list_keys(tree: "nodes.Template") -> Iterator[str]:
    """List the attributes, keys and other constants that a template names."""
    from jinja2 import nodes

    for node in tree.find_all((nodes.Getattr, nodes.Const)):
        if isinstance(node, nodes.Getattr):
            yield node.attr
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield node.value
