"""Which rows are read, and how an S3 store is reached.

Must not know: what is in files, credentials.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from batchinfer.config.section import Section, decides_results, key_error, reads_column
from batchinfer.config.values import Endpoint, OneOrMoreLocations, Text, Texts


class S3Settings(Section):
    """How to reach an S3 store. Credentials come from the environment or a profile."""

    endpoint_url: Endpoint | None = Field(
        default=None, description="URL of an S3-compatible server; null means AWS."
    )
    profile: Text | None = Field(
        default=None,
        description="Profile name in the AWS configuration files; null means the default chain.",
    )
    region: Text | None = Field(
        default=None,
        description="Region name, such as eu-central-1; null means from the environment.",
    )
    anonymous: bool = Field(default=False, description="Send unsigned requests (public buckets).")
    requester_pays: bool = Field(
        default=False, description="Pay for the requests, if the bucket requires it."
    )

    @model_validator(mode="after")
    def _check(self) -> S3Settings:
        if self.anonymous and self.profile is not None:
            raise key_error(
                "anonymous", "contradicts profile: unsigned requests use no credentials"
            )
        if self.anonymous and self.requester_pays:
            raise key_error(
                "anonymous", "contradicts requester_pays: an unsigned request names no payer"
            )
        return self


class InputSettings(Section):
    """Which rows are read."""

    path: OneOrMoreLocations = Field(
        description="Parquet input: a glob, a folder or a list of them; local or s3://bucket/…",
        min_length=1,
    )
    id_column: Text | None = Field(
        default=None,
        description="Column with the row's id; null means that shard and row number are the id.",
        json_schema_extra={**decides_results(), **reads_column("any", "the row's id (optional)")},
    )
    keep_columns: Texts = Field(
        default=(),
        description="Input columns that are copied to the output.",
        json_schema_extra={**decides_results(), **reads_column("any", "copied to the output")},
    )
    filter: Text | None = Field(
        default=None,
        description="Row-wise polars SQL expression; only rows where it is true are computed.",
        json_schema_extra={**decides_results(), **reads_column("any", "the columns it names")},
    )
    s3: S3Settings = Field(default_factory=S3Settings, description="S3 settings of the input.")
