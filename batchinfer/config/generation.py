"""Settings that decide what a prompt's completion is and how the engine computes it.

Must not know: engines themselves (the ranges are vLLM's, its package is not imported), rows, files.
"""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Annotated, Literal, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from batchinfer.config.section import (
    Section,
    decides_results,
    exactly_one,
    key_error,
    require_exactly_one,
)
from batchinfer.config.values import (
    MAX_COUNT,
    FrozenMapping,
    LocalOrHub,
    OneOrMoreTexts,
    PositiveOrAuto,
    ShareOrAuto,
    Text,
    Texts,
    Tuple,
    shown,
)
from batchinfer.quantization import meant_by

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
#: What each means and needs: batchinfer/quantization/table.py. A test holds the two together.
QuantizationName = Literal[
    "none",
    "fp32",
    "fp16",
    "bf16",
    "int8",
    "int4",
    "fp8",
    "fp4",
    "awq",
    "gptq",
    "nf4",
    "qtip",
    "exl3",
    "gguf",
]


def _known_name(name: object, *, may_be_auto: bool = True) -> object:
    """Refuse another program's word with the name that means it. What is unknown is left as is."""
    is_word = isinstance(name, str) and name not in get_args(QuantizationName)
    meant = meant_by(str(name)) if is_word else None
    if meant is None or (meant == "auto" and not may_be_auto):
        return name
    what = "which takes what the checkpoint is" if meant == "auto" else "the name for it here"
    raise ValueError(f"write {meant}, {what}, got {shown(name)}")


Quantization = Annotated[Literal["auto", QuantizationName], BeforeValidator(_known_name)]
_Fallback = Annotated[QuantizationName, BeforeValidator(partial(_known_name, may_be_auto=False))]
#: What each means and needs: batchinfer/quantization/kv_cache.py.
KvCacheDtype = Literal[
    "auto",
    "fp8",
    "fp8_e5m2",
    "fp8_per_token_head",
    "int8_per_token_head",
    "int4_per_token_head",
]

_DTYPE_NAMES: dict[object, Dtype] = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
}
_DTYPE_OF_QUANTIZATION: dict[str, Dtype] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
_MAX_GIB = 1e6
_CONSTRAINTS = ("json_schema", "regex", "choice", "grammar")


class ModelSettings(Section):
    """Which model, and in which precision."""

    path: LocalOrHub = Field(
        description="Model folder, or a hub name where there is network.",
        json_schema_extra=decides_results("content"),
    )
    tokenizer: LocalOrHub | None = Field(
        default=None,
        description="Tokenizer folder or hub name; null means the model's.",
        json_schema_extra=decides_results("content"),
    )
    revision: Text | None = Field(
        default=None,
        description="Branch, tag or commit of a hub model; null means its default branch.",
    )
    quantization: Quantization = Field(
        default="auto",
        description="auto: as the checkpoint says; none: unquantized; fp32, fp16, bf16: "
        "unquantized in that precision; fp8: a checkpoint, or on the fly; the others: a "
        "checkpoint of that kind (docs/quantization.md).",
        json_schema_extra=decides_results("resolved"),
    )
    quantization_fallback: Annotated[tuple[_Fallback, ...], Tuple] = Field(
        default=(),
        description="Names to take instead, the first that this machine can run, where it cannot "
        "run the one above.",
    )
    dtype: Annotated[
        Dtype,
        BeforeValidator(
            lambda name: _DTYPE_NAMES.get(name, name) if isinstance(name, str) else name
        ),
        WithJsonSchema({"enum": ["auto", "float32", "float16", "bfloat16", *_DTYPE_NAMES]}),
    ] = Field(
        default="auto",
        description="Precision of weights and activations; auto: the model's, float32 on a CPU "
        "that is slow in it, or what the output was begun in.",
        json_schema_extra=decides_results("resolved"),
    )
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        BeforeValidator(lambda name: "fp8" if name == "fp8_e4m3" else name),
        WithJsonSchema({"enum": [*get_args(KvCacheDtype), "fp8_e4m3"]}),
    ] = Field(
        default="auto",
        description="What keys and values of past tokens are stored in; auto: model.dtype, or as "
        "the checkpoint says; fewer bits: room for more tokens (docs/quantization.md).",
        json_schema_extra=decides_results(),
    )
    lora: LocalOrHub | None = Field(
        default=None,
        description="Folder or hub name of a LoRA adapter that every row is computed with.",
        json_schema_extra=decides_results("content"),
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="Longest prompt + completion in tokens; null means the model's.",
        json_schema_extra=decides_results("resolved"),
    )
    save_mode: bool = Field(
        default=False,
        description="On a GPU: keep KV cache that has no room there in the host's memory.",
    )
    save_mode_gib: float | None = Field(
        default=None,
        gt=0,
        le=_MAX_GIB,
        description="GiB of the host's memory for save_mode; null: a quarter of what is free.",
    )
    cpu_offload_gib: float = Field(
        default=0.0,
        ge=0,
        le=_MAX_GIB,
        description="GiB of weights, for each GPU, that stay in the host's memory and are read "
        "from there in every step.",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=MAX_COUNT, description="Number of GPUs that share the model."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model. Only for models you trust.",
    )

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        for name in (self.quantization, *self.quantization_fallback):
            wanted = _DTYPE_OF_QUANTIZATION.get(name)
            if wanted is not None and self.dtype not in ("auto", wanted):
                raise key_error(
                    "dtype", f"{self.dtype} contradicts quantization {name}; give only one"
                )
        if self.save_mode_gib is not None and not self.save_mode:
            raise key_error("save_mode_gib", "is the size of save_mode: set that to true")
        if self.quantization_fallback and self.quantization == "auto":
            raise key_error(
                "quantization_fallback", "needs a quantization by name to fall back from, not auto"
            )
        return self

    @property
    def resolved_dtype(self) -> Dtype:
        """The dtype asked for by `dtype` or by a `quantization` that names one; else auto."""
        return _DTYPE_OF_QUANTIZATION.get(self.quantization, self.dtype)


class StructuredSettings(Section):
    """What form every completion must have."""

    model_config = ConfigDict(json_schema_extra=exactly_one(_CONSTRAINTS))

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
        require_exactly_one(self, _CONSTRAINTS)
        return self


class SamplingSettings(Section):
    """How tokens are chosen. Ranges are vLLM's; the defaults do not depend on the model."""

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
        description="Smallest set of tokens with this probability; 1 is off.",
    )
    top_k: int = Field(
        default=0,
        ge=-1,
        le=MAX_COUNT,
        description="Number of likeliest tokens to choose from; 0 is off.",
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Least probability relative to the likeliest token; 0 is off.",
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
        description="Makes sampling repeatable: each row gets a seed derived from it; null: random",
    )
    n: int = Field(default=1, ge=1, le=16384, description="Number of completions for each row.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Number of likeliest tokens with logprobs at each position; 0: only the chosen "
        "token's; null: none.",
    )
    prompt_logprobs: bool = Field(
        default=False, description="Also the logprob of each prompt token."
    )
    ignore_eos: bool = Field(
        default=False, description="Go on to max_tokens past the end-of-text token (benchmarks)."
    )
    structured: StructuredSettings | None = Field(
        default=None, description="Constrain the form of the completion; null is free text."
    )

    @model_validator(mode="after")
    def _check(self) -> SamplingSettings:
        if self.n > 1 and self.is_greedy:
            raise key_error(
                "n", f"{self.n} samples need temperature > 0 (greedy samples would be equal)"
            )
        if 0 < self.temperature < 0.01:
            raise key_error(
                "temperature",
                f"must be 0 or at least 0.01, got {self.temperature} (vLLM would raise it to 0.01)",
            )
        return self

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken: equal prompts have equal completions."""
        return self.temperature == 0


class EngineSettings(Section):
    """How the engine is sized. Texts do not depend on it, beyond rounding."""

    name: Literal["vllm"] = Field(default="vllm", description="Which engine.")
    max_num_seqs: PositiveOrAuto = Field(
        default="auto", description="Most sequences that run at once; auto: by the device."
    )
    max_num_batched_tokens: PositiveOrAuto = Field(
        default="auto", description="Most tokens in one engine step; auto: by the device."
    )
    gpu_memory_utilization: ShareOrAuto = Field(
        default="auto",
        description="Share of the GPU's memory that the engine may use; auto: 0.9, or what other "
        "processes leave.",
    )
    options: FrozenMapping = Field(
        default_factory=dict,
        validate_default=True,
        description="Other vLLM engine arguments by name, such as enforce_eager: true. What only "
        "sizes, places or watches the engine may change between runs.",
        json_schema_extra=decides_results(),
    )

    @model_validator(mode="after")
    def _check(self) -> EngineSettings:
        own = {"model": "model.path"}
        own |= {key: f"model.{key}" for key in ModelSettings.model_fields if key != "path"}
        own |= {key: f"engine.{key}" for key in EngineSettings.model_fields if key != "options"}
        for option in self.options:
            if option in own:
                raise key_error(f"options.{option}", f"has its own setting: use {own[option]}")
            if option == "hf_token":
                raise key_error("options.hf_token", "is a secret; set HF_TOKEN in the environment")
        return self
