"""The job: every setting with its meaning, its range and its only default.

Must not know: engines, what is in files, where a value came from (YAML, environment, --set).
Invariants: a Job is immutable and complete, unknown keys do not exist, and
`Job.model_validate(job.model_dump(mode="json")) == job`. Descriptions are editors' hover text.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from batchinfer.config.engine import EngineSettings
from batchinfer.config.model import ModelSettings
from batchinfer.config.sampling import SamplingSettings
from batchinfer.config.score import ScoreSettings
from batchinfer.config.section import (
    Section,
    TaskSection,
    decides_results,
    exactly_one,
    key_error,
    require_exactly_one,
)
from batchinfer.config.template_file import text_of
from batchinfer.config.values import (
    MAX_COUNT,
    Endpoint,
    FixedLocation,
    FrozenMapping,
    OneOrMoreLocations,
    Slug,
    Text,
    Texts,
    Tuple,
)

#: What a job may compute. Each has a section below, and its code in tasks/NAME.py.
TaskName = Literal["generate", "score"]

MAX_WINDOW_ROWS = 1 << 24
_MAX_WINDOW_RESULTS = 1 << 28  # a byte each, in one array
_PROMPT_KINDS = ("column", "template", "messages", "messages_column", "token_ids_column")
# Of a chat template's variables, those that cannot come from prompt.chat_template_kwargs.
_TAKEN_KWARGS = {
    "messages": "the conversation comes from prompt.messages or prompt.messages_column",
    "conversations": "the conversation comes from prompt.messages or prompt.messages_column",
    "chat_template": "give the template as prompt.chat_template",
    "continue_final_message": "set prompt.continue_final_message: true",
    "return_assistant_tokens_mask": "nothing here is trained",
}


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
                "anonymous", "contradicts requester_pays: an unsigned request names nobody who pays"
            )
        return self


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


class InputSettings(Section):
    """Which rows are read."""

    path: OneOrMoreLocations = Field(
        description="Parquet input: a glob, a folder or a list of them; local or s3://bucket/…",
        min_length=1,
    )
    id_column: Text | None = Field(
        default=None,
        description="Column with the row's id; null means that shard and row number are the id.",
        json_schema_extra=decides_results(),
    )
    keep_columns: Texts = Field(
        default=(),
        description="Input columns that are copied to the output.",
        json_schema_extra=decides_results(),
    )
    filter: Text | None = Field(
        default=None,
        description="Row-wise polars SQL expression; only rows where it is true are computed.",
        json_schema_extra=decides_results(),
    )
    s3: S3Settings = Field(default_factory=S3Settings, description="S3 settings of the input.")


class Message(Section):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks."
    )
    content: str = Field(description="Jinja2 template of the text; variables are input columns.")


class PromptSettings(Section):
    """Where the prompt of a row comes from."""

    model_config = ConfigDict(json_schema_extra=exactly_one(_PROMPT_KINDS))

    column: Text | None = Field(
        default=None, description="Column whose text is the prompt, unchanged."
    )
    template: Text | None = Field(
        default=None, description="Jinja2 template of a plain prompt; variables are input columns."
    )
    messages: Annotated[tuple[Message, ...], Tuple] | None = Field(
        default=None, description="Chat messages; rendered with the chat template.", min_length=1
    )
    messages_column: Text | None = Field(
        default=None,
        description="Column with a list of {role, content}; rendered with the chat template.",
    )
    token_ids_column: Text | None = Field(
        default=None, description="Column with a list of token ids, used unchanged."
    )
    on_too_long: Literal["error", "truncate_left", "truncate_right"] = Field(
        default="error",
        description="When prompt + max_tokens exceed max_model_len: an error in the row's result, "
        "or cut the start (left) or the end (right) of the row's text.",
    )
    continue_final_message: bool = Field(
        default=False,
        description="The last message, the assistant's, is the beginning of the answer: the model "
        "continues it instead of beginning another.",
    )
    chat_template: Text | None = Field(
        default=None,
        description="Chat template: its name, a local file, or its Jinja2 text; null means the "
        "tokenizer's own.",
    )
    chat_template_kwargs: FrozenMapping = Field(
        default_factory=dict,
        validate_default=True,
        description="Extra variables of the chat template, such as enable_thinking.",
    )

    @field_validator("chat_template")
    @classmethod
    def _text_of_file(cls, template: str | None) -> str | None:
        return None if template is None else text_of(template)

    @model_validator(mode="after")
    def _check(self) -> PromptSettings:
        require_exactly_one(self, _PROMPT_KINDS)
        if self.messages is None and self.messages_column is None:
            for key in ("continue_final_message", "chat_template", "chat_template_kwargs"):
                if getattr(self, key):
                    raise key_error(key, "only applies to messages and messages_column")
        if self.continue_final_message and self.messages and self.messages[-1].role != "assistant":
            raise key_error(
                "continue_final_message", "needs a last message that is the assistant's"
            )
        for name, instead in _TAKEN_KWARGS.items():
            if name in self.chat_template_kwargs:
                raise key_error("chat_template_kwargs", f"cannot set {name}: {instead}")
        return self


class PackingSettings(Section):
    """In which order and portions rows reach the engine. No setting changes what is computed."""

    order: Literal["auto", "length", "prefix", "input"] = Field(
        default="auto",
        description="length: longest expected work of a window first; prefix: rows that share a "
        "prompt prefix next to each other, for the engine's prefix cache; auto: prefix where that "
        "saves work, else input; input: as in the file.",
    )
    window_rows: int = Field(
        default=16384,
        ge=1,
        le=MAX_WINDOW_ROWS,
        description="Rows of a window; fixed for the life of an output.",
    )
    buffer_tokens: int = Field(
        default=3_000_000,
        ge=1,
        le=MAX_COUNT,
        description="Most prompt tokens that are ordered together, across windows and shards.",
    )
    batch_rows: int = Field(
        default=256, ge=1, le=MAX_COUNT, description="Rows that are admitted together."
    )
    deduplicate: bool = Field(
        default=True,
        description="Compute identical prompts of a chunk (a window, or the part of it that has "
        "buffer_tokens) once, only under greedy decoding.",
    )


class CheckpointSettings(Section):
    """When finished rows become durable: whichever comes first."""

    every_rows: int = Field(
        default=512, ge=1, le=MAX_COUNT, description="Flush after this many finished rows."
    )
    every_s: float = Field(
        default=15.0,
        gt=0,
        le=1e9,
        description="Flush when the oldest finished row has waited this many seconds.",
    )


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


class LimitSettings(Section):
    """When a run gives up or stops."""

    max_failed_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Fraction of failed rows (0 to 1) above which the exit code is 3.",
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Stop cleanly after this many seconds; the next start continues. null: never.",
    )


class Job(Section):
    """A batch inference job."""

    version: Literal[1] = Field(description="Version of this file format: 1.")
    name: Slug = Field(
        description="Short name of the job: letters, digits, dots, dashes, underscores."
    )
    task: TaskName = Field(
        default="generate",
        description="What is computed for a row. generate: completions of its prompt; score: the "
        "log-probability of each token of a text.",
        json_schema_extra=decides_results(),
    )
    input: InputSettings = Field(description="Which rows are read.")
    prompt: PromptSettings = Field(
        description="How a row becomes a prompt.", json_schema_extra=decides_results()
    )
    model: ModelSettings = Field(description="Which model, and in which precision.")
    sampling: SamplingSettings = Field(
        default_factory=SamplingSettings,
        description="How tokens are chosen.",
        json_schema_extra=decides_results(),
    )
    score: ScoreSettings = Field(
        default_factory=ScoreSettings,
        description="Which tokens are scored, with task: score.",
        json_schema_extra=decides_results(),
    )
    packing: PackingSettings = Field(
        default_factory=PackingSettings, description="In which order rows reach the engine."
    )
    checkpoint: CheckpointSettings = Field(
        default_factory=CheckpointSettings, description="When finished rows become durable."
    )
    engine: EngineSettings = Field(
        default_factory=EngineSettings, description="How the engine is sized."
    )
    output: OutputSettings = Field(description="Where results go.")
    limits: LimitSettings = Field(
        default_factory=LimitSettings, description="When a run gives up or stops."
    )

    @model_validator(mode="after")
    def _check_task(self) -> Job:
        """What is set for another task would be ignored."""
        sections = [(name, own) for name, own in self if isinstance(own, TaskSection)]
        for name, own in sections:
            for key in type(own).model_fields if own.task != self.task else ():
                if getattr(own, key) != getattr(type(own)(), key):
                    raise key_error(f"{name}.{key}", f"does not apply to task: {self.task}")
        for _, own in sections:
            if own.task == self.task:
                own.check_beside(
                    max_model_len=self.model.max_model_len, on_too_long=self.prompt.on_too_long
                )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Job:
        num_results = self.packing.window_rows * self.sampling.n
        if num_results > _MAX_WINDOW_RESULTS:
            raise key_error(
                "packing.window_rows",
                f"times sampling.n is {num_results:,} results of a window, more than "
                f"{_MAX_WINDOW_RESULTS:,}: at most {_MAX_WINDOW_RESULTS // self.sampling.n:,} here",
            )
        return self
