"""Chat templates of the kinds that models have, short, for tests."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

END = "<|im_end|>"
_OPEN = "<|im_start|>assistant\n"

HYBRID = (
    "{% set ns = namespace(last_user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}"
    "{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last_user and "
    "(loop.last or m.reasoning_content) %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}" + _OPEN + "{% if enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Writes an empty thought for an answer without one, if that is the last message only."""

OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content is defined %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}" + _OPEN + "{% if enable_thinking is not false %}"
    "<think>\n{% endif %}{% endif %}"
)
"""Opens a thought at the end of the generation prompt; closes it for answers with a thought."""

STRIPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}" + _OPEN + "{% if THINKS %}<think>\n{% endif %}{% endif %}"
)
"""Opens a thought and takes thoughts out of answers; a variable turns the former off if named."""

OTHER_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + _OPEN + "{% endif %}"
)
"""Ends the last answer with another token than those before it."""


def plain_rendering(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """Render with plain Jinja, in the order of the options that transformers sets."""
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, **variables
    )
