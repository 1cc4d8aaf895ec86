"""How many tokens a prompt may have, and what is said of one that has more.

Must not know: rows, tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchinfer.errors import ConfigError, RowError


@dataclass(frozen=True, slots=True)
class PromptLimit:
    """At most `max_tokens` tokens; `excess` ends the sentence about more of them.

    `room`: for people, what prompts that are shortened are cut to fit.
    """

    max_tokens: int
    excess: str
    room: str

    @classmethod
    def of_generation(cls, *, max_model_len: int, max_tokens: int) -> PromptLimit:
        """What completions of up to `max_tokens` leave. Raises ConfigError if that is nothing."""
        if max_tokens >= max_model_len:
            raise ConfigError(
                f"sampling.max_tokens {max_tokens} leaves no room for a prompt in the model's "
                f"context of {max_model_len} tokens: lower it, or raise model.max_model_len"
            )
        return cls(
            max_model_len - max_tokens,
            f"and max_tokens {max_tokens} exceed max_model_len {max_model_len}",
            "max_model_len less sampling.max_tokens",
        )

    def too_long(self, num_tokens: int | str, when: str = "") -> RowError:
        """The error of a row with a prompt of more tokens."""
        return RowError("prompt_too_long", f"{num_tokens} prompt tokens{when} {self.excess}")


#: For each row its own limit, or why it has none.
RowLimits = Sequence[PromptLimit | RowError]
