"""How tokens are chosen, and what form a completion must have.

The ranges are vLLM's; what another engine refuses beyond them, its kind refuses in `check`. Must
not know: engines' code, rows, files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from batchinfer.config.json_schema import reference_problem, schema_problem
from batchinfer.config.per_row import CONSTRAINTS, PerRowSettings
from batchinfer.config.section import (
    Section,
    TaskSection,
    exactly_one,
    key_error,
    require_exactly_one,
)
from batchinfer.config.values import (
    MAX_COUNT,
    FrozenMapping,
    OneOrMoreTexts,
    Text,
    Texts,
    Tuple,
    thaw,
)


class StructuredSettings(Section):
    """What form every completion must have."""

    model_config = ConfigDict(json_schema_extra=exactly_one(CONSTRAINTS))

    json_schema: FrozenMapping | None = Field(
        default=None, description="JSON Schema; the completion is a JSON document that fits it."
    )
    regex: Text | None = Field(
        default=None, description="Regular expression that the whole completion matches."
    )
    choice: Texts | None = Field(
        default=None, description="The completion is one of these texts.", min_length=1
    )
    grammar: Text | None = Field(
        default=None, description="Context-free grammar in EBNF that derives the completion."
    )

    @field_validator("json_schema")
    @classmethod
    def _is_whole(cls, schema: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        if schema is None:
            return None
        if problem := schema_problem(thaw(schema)) or reference_problem(schema):
            raise ValueError(problem)
        return schema

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str | None) -> str | None:
        if regex is not None:
            try:
                with warnings.catch_warnings(action="ignore"):  # of what another Python may read
                    re.compile(regex)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"is not a valid regular expression: {error}") from None
        return regex

    @model_validator(mode="after")
    def _check(self) -> StructuredSettings:
        require_exactly_one(self, CONSTRAINTS)
        return self

    @property
    def constraint(self) -> tuple[str, Any]:
        """Which one it is, by its key, and its plain value."""
        return next(
            (key, thaw(value)) for key in CONSTRAINTS if (value := getattr(self, key)) is not None
        )


class SamplingSettings(TaskSection):
    """How tokens are chosen. The defaults do not depend on the model."""

    task: ClassVar[str] = "generate"
    samples_key: ClassVar[str | None] = "n"

    max_tokens: int = Field(
        default=256, ge=1, le=MAX_COUNT, description="Longest completion, in tokens."
    )
    temperature: float = Field(
        default=0.0, ge=0, le=2, description="Randomness; 0 is greedy, else from 0.01 to 2."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample from the smallest set of tokens with this probability; 1 is off.",
    )
    top_k: int = Field(
        default=0,
        ge=-1,
        le=MAX_COUNT,
        description="Sample from the k most likely tokens; 0 is off.",
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Least probability relative to the most likely token; 0 is off.",
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        description="Penalty for tokens that the completion already has; 0 is off.",
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        description="Penalty for each earlier use in the completion; 0 is off.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=1e-6,
        le=1e6,
        description="Factor against tokens in prompt and completion so far; 1 is off.",
    )
    stop: OneOrMoreTexts = Field(
        default=(), description="Texts that end the completion (not included)."
    )
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_COUNT)], ...], Tuple] = Field(
        default=(), description="Token ids that end the completion, besides the model's own."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=2**63 - 1,
        description="Repeatable sampling: each row gets a seed derived from it; null: random.",
    )
    n: int = Field(default=1, ge=1, le=16384, description="Number of completions for each row.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Number of most likely tokens to report at each position; 0: only the chosen "
        "token's; null: none.",
    )
    prompt_logprobs: bool = Field(
        default=False, description="Also the logprob of each prompt token."
    )
    ignore_eos: bool = Field(
        default=False, description="Continue to max_tokens past the end-of-text token (benchmarks)."
    )
    structured: StructuredSettings | None = Field(
        default=None, description="Constrain the form of the completion; null is free text."
    )
    reasoning_parser: Text | None = Field(
        default=None,
        description="The engine's name for how the model marks its thoughts: they get the column "
        "reasoning, and completion is the answer; null: both are the completion.",
    )
    thinking_budget_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_COUNT,
        description="Longest thought, in tokens: then the engine ends it; null: max_tokens.",
    )
    per_row: PerRowSettings = Field(
        default_factory=PerRowSettings, description="Columns with settings of each row's own."
    )

    @model_validator(mode="after")
    def _check(self) -> SamplingSettings:
        if self.n > 1 and self.is_greedy and not self.per_row.sets("temperature"):
            raise key_error(
                "n", f"{self.n} samples need temperature > 0 (greedy samples would be equal)"
            )
        if self.thinking_budget_tokens is not None:
            self._check_budget(self.thinking_budget_tokens)
        if 0 < self.temperature < 0.01:
            raise key_error(
                "temperature",
                f"must be 0 or at least 0.01, got {self.temperature}: engines raise it to that",
            )
        return self

    def _check_budget(self, budget: int) -> None:
        if self.reasoning_parser is None:
            raise key_error(
                "thinking_budget_tokens",
                "needs sampling.reasoning_parser, which says how the model marks its thoughts",
            )
        if budget >= self.max_tokens:
            raise key_error(
                "thinking_budget_tokens",
                f"{budget} leaves no room for an answer in sampling.max_tokens {self.max_tokens}",
            )

    def check_beside(self, *, max_model_len: int | None, on_too_long: str) -> None:
        if max_model_len is not None and self.max_tokens >= max_model_len:
            raise key_error(
                "sampling.max_tokens",
                f"{self.max_tokens} leaves no room for a prompt in model.max_model_len "
                f"{max_model_len}",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken: equal prompts have equal completions."""
        return self.temperature == 0

    @property
    def uses_seeds(self) -> bool:
        """Whether requests carry seeds, derived from the job's or their rows' own."""
        has_seeds = self.seed is not None or self.per_row.sets("seed")
        return has_seeds and self.may_have("temperature")

    def may_have(self, name: str) -> bool:
        """Whether a setting differs from its default, or may do so in a row."""
        is_set: bool = getattr(self, name) != type(self).model_fields[name].default
        return is_set or self.per_row.sets(name)

    def of_row(self, values: Mapping[str, Any]) -> SamplingSettings:
        """Those of a row whose columns have these values; what is None there is the job's.

        Raises ValidationError.
        """
        own = {name: value for name, value in self if name != "per_row"}
        given = {name: value for name, value in values.items() if value is not None}
        if constraint := {name: given.pop(name) for name in CONSTRAINTS if name in given}:
            own["structured"] = constraint
        return SamplingSettings.model_validate(own | given)
