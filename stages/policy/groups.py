"""A prompt and its completions as token ids; importable without torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt and its completions, as token ids."""

    prompt_ids: IntArray
    """int32 [P], P >= 1: the last prompt token predicts the first token of each completion."""
    completions: tuple[IntArray, ...]
    """int32 [T_i] each, T_i >= 1."""

    def __post_init__(self) -> None:
        assert len(self.prompt_ids) > 0, "nothing predicts the first completion token"
        assert self.completions
        assert all(len(ids) > 0 for ids in self.completions)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the prompt, counted once, and in all completions."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.completions)

    @property
    def num_read(self) -> int:
        """Number of tokens that the model reads: all but the last token of each completion."""
        return self.num_tokens - len(self.completions)

    def split(self) -> tuple["Group", ...]:
        """Split into one group a completion, each with the whole prompt."""
        return tuple(
            Group(prompt_ids=self.prompt_ids, completions=(ids,)) for ids in self.completions
        )
