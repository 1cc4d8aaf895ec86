"""The job: which sections it has, and what must hold across them.

Each section is in a module beside this one: every setting with its meaning, its range and its only
default. Must not know: engines, what is in files, where a value came from (YAML, --set).
Invariants: a Job is immutable and complete, unknown keys do not exist, and
`Job.model_validate(job.model_dump(mode="json")) == job`. Descriptions are editors' hover text.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from batchinfer.config.engine import EngineSettings
from batchinfer.config.input import InputSettings
from batchinfer.config.model import ModelSettings
from batchinfer.config.output import OutputSettings
from batchinfer.config.prompt import PromptSettings
from batchinfer.config.run import CheckpointSettings, LimitSettings, PackingSettings
from batchinfer.config.sampling import SamplingSettings
from batchinfer.config.score import ScoreSettings
from batchinfer.config.section import Section, TaskSection, decides_results, key_error
from batchinfer.config.values import Slug

#: What a job may compute. Each has a section below, and its code in tasks/NAME.py.
TaskName = Literal["generate", "score"]

_MAX_WINDOW_RESULTS = 1 << 28  # a byte each, in one array


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
    executor: Literal["local", "ray"] = Field(
        default="local",
        description="Where replicas of the engine run. local: on this machine; ray: in the Ray "
        "cluster that RAY_ADDRESS names, else in an instance of Ray on this machine.",
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
        for name, own in sections:
            if own.task == self.task:
                own.check_beside(
                    max_model_len=self.model.max_model_len, on_too_long=self.prompt.on_too_long
                )
                if own.samples_key is not None:
                    self._check_window(getattr(own, own.samples_key), f"{name}.{own.samples_key}")
        return self

    @model_validator(mode="after")
    def _check_executor(self) -> Job:
        if self.executor == "ray" and isinstance(self.engine.devices, tuple):
            raise key_error(
                "engine.devices",
                "lists indices of GPUs of one machine, and executor: ray places replicas in a "
                "cluster: give a number of GPUs, or auto",
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Job:
        if self.sampling.per_row.lora is not None and not self.model.adapters:
            raise key_error("sampling.per_row.lora", "rows name adapters of model.adapters: set it")
        return self

    def _check_window(self, num_samples: int, key: str) -> None:
        num_results = self.packing.window_rows * num_samples
        if num_results > _MAX_WINDOW_RESULTS:
            raise key_error(
                "packing.window_rows",
                f"times {key} is {num_results:,} results of a window, more than "
                f"{_MAX_WINDOW_RESULTS:,}: at most {_MAX_WINDOW_RESULTS // num_samples:,} here",
            )
