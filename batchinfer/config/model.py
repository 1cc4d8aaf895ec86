"""Which model, and in which precision.

Must not know: engines, contents of model folders, which names of precisions there are.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from batchinfer.config.precision import AnyDtype, AnyKvCacheDtype, Dtype, Fallback, Quantization
from batchinfer.config.section import Section, decides_results, key_error
from batchinfer.config.values import MAX_COUNT, LocalOrHub, NamedPaths, Text, Tuple

_DTYPE_OF_QUANTIZATION: dict[str, Dtype] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
_MAX_GIB = 1e6


class ModelSettings(Section):
    """Which model, and in which precision."""

    path: LocalOrHub = Field(
        description="Model folder or hub name.",
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
    quantization_fallback: Annotated[tuple[Fallback, ...], Tuple] = Field(
        default=(),
        description="Names to try in order where this machine cannot run `quantization`; the "
        "first that it can run is taken.",
    )
    dtype: AnyDtype = Field(
        default="auto",
        description="Precision of weights and activations; auto: the model's, float32 on a CPU "
        "that is slow in it, or what the output was begun in.",
        json_schema_extra=decides_results("resolved"),
    )
    kv_cache_dtype: AnyKvCacheDtype = Field(
        default="auto",
        description="How keys and values of past tokens are stored; auto: model.dtype, or as "
        "the checkpoint says; fewer bits: room for more tokens (docs/quantization.md).",
        json_schema_extra=decides_results(),
    )
    lora: LocalOrHub | None = Field(
        default=None,
        description="Folder or hub name of a LoRA adapter that every row is computed with.",
        json_schema_extra=decides_results("content"),
    )
    adapters: NamedPaths = Field(
        default_factory=dict,
        validate_default=True,
        description="LoRA adapters that rows name (sampling.per_row.lora): name to folder or hub "
        "name.",
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
        description="On a GPU: move KV cache that does not fit there to the host's memory.",
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
    keep_packed: bool | Literal["auto"] = Field(
        default="auto",
        description="On a CPU: whether trellis-coded weights (qtip, exl3) stay packed in memory "
        "and are decoded in every step; auto: where decoded they would not fit.",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=MAX_COUNT, description="Number of GPUs that share the model."
    )
    pipeline_parallel_size: int = Field(
        default=1,
        ge=1,
        le=MAX_COUNT,
        description="Number of stages that share the layers, each on tensor_parallel_size GPUs.",
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
