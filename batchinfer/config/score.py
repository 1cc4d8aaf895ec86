"""How the tokens of a text are scored: `task: score`.

Must not know: engines, rows, files.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from batchinfer.config.section import Section, key_error
from batchinfer.config.values import MAX_COUNT, Text


class ScoreSettings(Section):
    """Which tokens are scored, and with how much text before them."""

    completion_column: Text | None = Field(
        default=None,
        description="Column whose text is scored as the continuation of the prompt (with "
        "prompt.token_ids_column: whose token ids); null: the prompt itself is scored.",
    )
    context: int | None = Field(
        default=None,
        ge=2,
        le=MAX_COUNT,
        description="Most tokens of a window; longer rows are scored in several. null: "
        "max_model_len.",
    )
    stride: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="Tokens from the start of a window to that of the next: each token past the "
        "first window is scored with at least context - stride tokens before it. null: half of "
        "the context.",
    )

    @model_validator(mode="after")
    def _check(self) -> ScoreSettings:
        if self.context is not None and self.stride is not None and self.stride >= self.context:
            raise key_error(
                "stride",
                f"{self.stride} must be less than score.context {self.context}: the first token of "
                "a window is not scored, so windows have to overlap",
            )
        return self
