"""The job: its models, loading with overrides, JSON Schema. Imports only pydantic and yaml."""

from batchinfer.config.deciding import deciding_keys, deciding_values, without_defaults
from batchinfer.config.engine import DEFAULT_ENGINE, ENGINES, EngineSettings
from batchinfer.config.input import InputSettings, S3Settings
from batchinfer.config.job import Job, TaskName
from batchinfer.config.load import (
    COMMAND_LINE,
    Fixed,
    LoadedJob,
    explain,
    job_from,
    load_job,
    load_section,
    name_of,
)
from batchinfer.config.model import ModelSettings
from batchinfer.config.output import OutputSettings
from batchinfer.config.overrides import Override
from batchinfer.config.own_sampling import OwnSampling
from batchinfer.config.per_row import CONSTRAINTS, PerRowSettings
from batchinfer.config.prompt import Message, PromptSettings
from batchinfer.config.run import CheckpointSettings, LimitSettings, PackingSettings
from batchinfer.config.sampling import SamplingSettings, StructuredSettings
from batchinfer.config.schema import job_schema, job_schema_text
from batchinfer.config.score import ScoreSettings
from batchinfer.config.values import thaw
from batchinfer.config.written import written

__all__ = [
    "COMMAND_LINE",
    "CONSTRAINTS",
    "DEFAULT_ENGINE",
    "ENGINES",
    "CheckpointSettings",
    "EngineSettings",
    "Fixed",
    "InputSettings",
    "Job",
    "LimitSettings",
    "LoadedJob",
    "Message",
    "ModelSettings",
    "OutputSettings",
    "Override",
    "OwnSampling",
    "PackingSettings",
    "PerRowSettings",
    "PromptSettings",
    "S3Settings",
    "SamplingSettings",
    "ScoreSettings",
    "StructuredSettings",
    "TaskName",
    "deciding_keys",
    "deciding_values",
    "explain",
    "job_from",
    "job_schema",
    "job_schema_text",
    "load_job",
    "load_section",
    "name_of",
    "thaw",
    "without_defaults",
    "written",
]
