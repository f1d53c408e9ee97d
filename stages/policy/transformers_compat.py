"""Private parts of transformers that the policy relies on.

Tested with transformers 5.19. tests/stages/policy/test_transformers_compat.py names each of them
and fails when an upgrade moves one.
"""

from transformers import PreTrainedModel


def attention_name(model: PreTrainedModel) -> str:
    """Name of the attention function that a model uses, such as "sdpa".

    transformers has the public setter set_attn_implementation, but no public getter.
    """
    return str(model.config._attn_implementation)
