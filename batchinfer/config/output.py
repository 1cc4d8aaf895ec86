"""Where results go.

Must not know: what results are, credentials.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from batchinfer.config.input import S3Settings
from batchinfer.config.section import Section, key_error
from batchinfer.config.values import FixedLocation, Text


class OutputS3Settings(S3Settings):
    """How to reach the S3 store of the output, and how what is written there is encrypted."""

    server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = Field(
        default=None,
        description="Encryption that the bucket's policy requires; null: the bucket's default.",
    )
    kms_key_id: Text | None = Field(
        default=None, description="Key of aws:kms encryption; null is the bucket's own."
    )

    @model_validator(mode="after")
    def _check_encryption(self) -> OutputS3Settings:
        if self.kms_key_id is not None and self.server_side_encryption in (None, "AES256"):
            raise key_error("kms_key_id", "needs server_side_encryption: aws:kms or aws:kms:dsse")
        return self


class OutputSettings(Section):
    """Where results go."""

    path: FixedLocation = Field(
        description="Folder of the results; local or s3://bucket/…; one job per folder."
    )
    s3: OutputS3Settings = Field(
        default_factory=OutputS3Settings, description="S3 settings of the output."
    )
    single_writer: bool = Field(
        default=False,
        description="For a store without conditional create or a file system without locks: you "
        "guarantee that only one run at a time works on this output.",
    )
