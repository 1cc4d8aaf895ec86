"""Which of a row's columns say how it is sampled.

Must not know: types of columns, rows.
"""

from __future__ import annotations

from pydantic import Field

from batchinfer.config.section import Section, reads_column
from batchinfer.config.values import Text

#: The keys of `sampling.structured`, which are one setting: a row has at most one of them.
CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")


class PerRowSettings(Section):
    """Input columns with a row's own settings; where one is null the row takes the job's."""

    max_tokens: Text | None = Field(
        default=None,
        description="Column of max_tokens.",
        json_schema_extra=reads_column("integer or float", "the row's own max_tokens"),
    )
    temperature: Text | None = Field(
        default=None,
        description="Column of temperature.",
        json_schema_extra=reads_column("float", "the row's own temperature"),
    )
    top_p: Text | None = Field(
        default=None,
        description="Column of top_p.",
        json_schema_extra=reads_column("float", "the row's own top_p"),
    )
    top_k: Text | None = Field(
        default=None,
        description="Column of top_k.",
        json_schema_extra=reads_column("integer or float", "the row's own top_k"),
    )
    min_p: Text | None = Field(
        default=None,
        description="Column of min_p.",
        json_schema_extra=reads_column("float", "the row's own min_p"),
    )
    presence_penalty: Text | None = Field(
        default=None,
        description="Column of presence_penalty.",
        json_schema_extra=reads_column("float", "the row's own presence_penalty"),
    )
    frequency_penalty: Text | None = Field(
        default=None,
        description="Column of frequency_penalty.",
        json_schema_extra=reads_column("float", "the row's own frequency_penalty"),
    )
    repetition_penalty: Text | None = Field(
        default=None,
        description="Column of repetition_penalty.",
        json_schema_extra=reads_column("float", "the row's own repetition_penalty"),
    )
    stop: Text | None = Field(
        default=None,
        description="Column of stop: a text or a list.",
        json_schema_extra=reads_column("string or list<string>", "the row's own stop"),
    )
    stop_token_ids: Text | None = Field(
        default=None,
        description="Column of stop_token_ids.",
        json_schema_extra=reads_column("list<integer>", "the row's own stop_token_ids"),
    )
    seed: Text | None = Field(
        default=None,
        description="Column of seeds, used as they are: plus the sample's number.",
        json_schema_extra=reads_column("integer or float", "the row's own seed"),
    )
    logprobs: Text | None = Field(
        default=None,
        description="Column of logprobs.",
        json_schema_extra=reads_column("integer or float", "the row's own logprobs"),
    )
    ignore_eos: Text | None = Field(
        default=None,
        description="Column of ignore_eos.",
        json_schema_extra=reads_column("bool", "the row's own ignore_eos"),
    )
    json_schema: Text | None = Field(
        default=None,
        description="Column of JSON Schemas, each as text.",
        json_schema_extra=reads_column("string", "a JSON Schema for the row's completion"),
    )
    regex: Text | None = Field(
        default=None,
        description="Column of regular expressions.",
        json_schema_extra=reads_column("string", "a regular expression for the row's completion"),
    )
    choice: Text | None = Field(
        default=None,
        description="Column of lists of texts.",
        json_schema_extra=reads_column("list<string>", "what the row's completion may be"),
    )
    grammar: Text | None = Field(
        default=None,
        description="Column of grammars in EBNF.",
        json_schema_extra=reads_column("string", "a grammar for the row's completion"),
    )

    lora: Text | None = Field(
        default=None,
        description="Column of names of model.adapters.",
        json_schema_extra=reads_column("string", "the adapter that the row is computed with"),
    )

    @property
    def columns(self) -> dict[str, str]:
        """Setting -> column, of those that are given."""
        return {name: column for name, column in self if column is not None}

    def sets(self, name: str) -> bool:
        """Whether rows may have a setting of `sampling` of their own."""
        names = CONSTRAINTS if name == "structured" else (name,)
        return any(getattr(self, own, None) is not None for own in names)
