"""How the tokens of a text are scored: `task: score`.

Must not know: engines, rows, files.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from batchinfer.config.section import TaskSection, key_error, reads_column
from batchinfer.config.values import MAX_COUNT, Text


class ScoreSettings(TaskSection):
    """Which tokens are scored, and with how much text before them."""

    task: ClassVar[str] = "score"

    completion_column: Text | None = Field(
        default=None,
        description="Column whose text is scored as the continuation of the prompt (with "
        "prompt.token_ids_column: whose token ids); null: the prompt itself is scored.",
        json_schema_extra=reads_column(
            "string or list<integer>", "the text to score; token ids with prompt.token_ids_column"
        ),
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

    top_logprobs: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Number of most likely tokens to report at each position, besides the scored "
        "one; null: none.",
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

    def check_beside(self, *, max_model_len: int | None, on_too_long: str) -> None:
        if on_too_long != "error":
            raise key_error(
                "prompt.on_too_long",
                "does not apply to task: score: a long text is scored in windows, see score.stride",
            )
        if max_model_len is not None and self.context is not None and self.context > max_model_len:
            raise key_error(
                "score.context", f"{self.context} is more than model.max_model_len {max_model_len}"
            )
