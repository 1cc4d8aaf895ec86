"""Which engine, and how it is sized.

Must not know: engines themselves.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticKnownError

from batchinfer.config.model import ModelSettings
from batchinfer.config.section import Section, decides_results, key_error
from batchinfer.config.values import DevicesOrAuto, FrozenMapping, PositiveOrAuto, ShareOrAuto

#: The engines that a job may name, each a folder of engine/ with its kind; a test compares.
ENGINES = ["vllm", "llama_cpp"]
DEFAULT_ENGINE = "vllm"


def _known(name: str) -> str:
    if name not in ENGINES:
        raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, ENGINES))})
    return name


EngineName = Annotated[
    str, AfterValidator(_known), WithJsonSchema({"enum": list(ENGINES), "type": "string"})
]

#: Of `model`, what `options` may name as well: the path is vLLM's `model`; stages were an option.
_OF_OPTIONS = ("path", "pipeline_parallel_size")


class EngineSettings(Section):
    """How the engine is sized. Texts do not depend on it, beyond rounding."""

    name: EngineName = Field(
        default=DEFAULT_ENGINE, description="Which engine.", json_schema_extra=decides_results()
    )
    devices: DevicesOrAuto = Field(
        default="auto",
        description="On how many devices a copy of the engine computes, or on which, by index; "
        "auto: on all visible GPUs, on a CPU one copy. Copies that are spread over several GPUs "
        "take as many together.",
    )
    max_num_seqs: PositiveOrAuto = Field(
        default="auto", description="Most sequences that run at the same time; auto: by the device."
    )
    max_num_batched_tokens: PositiveOrAuto = Field(
        default="auto", description="Most tokens in one engine step; auto: by the device."
    )
    tune: bool = Field(
        default=False,
        description="Search how many sequences, up to max_num_seqs, run fastest at once, while the "
        "first rows run; the best is remembered for later runs.",
    )
    gpu_memory_utilization: ShareOrAuto = Field(
        default="auto",
        description="Share of the GPU's memory that the engine may use; auto: 0.9, or what other "
        "processes leave.",
    )
    options: FrozenMapping = Field(
        default_factory=dict,
        validate_default=True,
        description="Other arguments of the engine by name, such as enforce_eager: true for vLLM. "
        "Those that cannot change results may differ between runs.",
        json_schema_extra=decides_results(),
    )

    @model_validator(mode="after")
    def _check(self) -> EngineSettings:
        own = {key: f"model.{key}" for key in ModelSettings.model_fields if key not in _OF_OPTIONS}
        own |= {key: f"engine.{key}" for key in EngineSettings.model_fields if key != "options"}
        for option in self.options:
            if option in own:
                raise key_error(f"options.{option}", f"has its own setting: use {own[option]}")
            if option == "hf_token":  # of any engine: job.json and `explain` show all options
                raise key_error("options.hf_token", "is a secret; set HF_TOKEN in the environment")
        return self
