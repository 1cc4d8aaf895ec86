"""What a comparison is asked to measure: the spec file, and the requests it comes to.

Must not know: how anything is measured, what is in model folders. Invariant: no two requests of a
spec have one label, and each reference is the label of another of its requests.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from batchinfer.config import DEFAULT_ENGINE, load_section
from batchinfer.config.engine import EngineName
from batchinfer.config.precision import Dtype, Quantization
from batchinfer.config.section import Section, key_error
from batchinfer.config.values import MAX_COUNT, FrozenMapping, LocalOrHub, Text, Tuple, thaw
from batchinfer.errors import ConfigError
from batchinfer.evaluation.comparison.names import Name, check_name
from batchinfer.evaluation.record import PerplexityRequest
from batchinfer.evaluation.settings import SECTIONS, is_allowed

#: Settings that an entry has a key of its own for.
_OWN = {
    "model.path": "model",
    "model.quantization": "quantization",
    "model.dtype": "dtype",
    "engine.name": "engine",
}


class _Shared(Section):
    engine: EngineName = Field(default=DEFAULT_ENGINE, description="Which engine.")
    settings: FrozenMapping = Field(
        default_factory=dict,
        validate_default=True,
        description="Further settings of the job by dotted key, such as engine.max_num_seqs: 8.",
    )

    @model_validator(mode="after")
    def _check_settings(self) -> _Shared:
        for key, value in self.settings.items():
            if key in _OWN:
                raise key_error("settings", f"{key}: an entry has its own key for it: {_OWN[key]}")
            if not is_allowed(key):
                hint = "" if not isinstance(value, dict) else ", such as engine.max_num_seqs: 8"
                raise key_error(
                    "settings",
                    f"{key} is not a setting that an entry may have: give dotted keys of the job "
                    f"file's sections {', '.join(SECTIONS)}{hint}",
                )
        return self


class Entry(_Shared):
    """One model, in one format or in several."""

    model: LocalOrHub = Field(description="Model folder or hub name.")
    family: Name | None = Field(
        default=None,
        description="Points of a family have one colour and are joined; null: the name of the "
        "model folder.",
    )
    label: Name | None = Field(
        default=None,
        description="What the entry is called; null: the family, and the quantization if one is "
        "asked for.",
    )
    quantization: Quantization = Field(
        default="auto", description="As model.quantization in a job file."
    )
    formats: Annotated[tuple[Quantization, ...], Tuple] | None = Field(
        default=None,
        min_length=1,
        description="Shorthand for one entry with each of these quantizations.",
    )
    dtype: Dtype = Field(default="auto", description="As model.dtype in a job file.")
    reference: Name | None = Field(
        default=None,
        description="Label of the entry that this one is compared with; null: the spec's.",
    )

    @model_validator(mode="after")
    def _check(self) -> Entry:
        if self.formats is not None:
            if self.label is not None:
                raise key_error("label", "one label for several formats: leave it out, or formats")
            if self.quantization != "auto":
                raise key_error("quantization", "give it or formats, not both")
        if self.family is None:
            try:
                check_name(self.family_name)
            except ValueError as error:
                raise key_error(
                    "model", f"its name is that of a family, which {error}: give a family"
                ) from None
        return self

    @property
    def family_name(self) -> str:
        return self.family or Path(self.model).name or self.model

    def labelled(self) -> Iterator[tuple[str, str]]:
        """(label, quantization) of each request."""
        for name in self.formats or (self.quantization,):
            default = self.family_name if name == "auto" else f"{self.family_name} {name}"
            yield self.label or default, name


class Spec(_Shared):
    """A comparison: one text, many models and formats."""

    title: Name | None = Field(default=None, description="Title above the table and the plots.")
    data: Text = Field(default="wikitext2", description="As --data of `batchinfer perplexity`.")
    column: Text | None = Field(
        default=None, description="Column with the texts, for Parquet data."
    )
    context: int = Field(default=2048, ge=2, le=MAX_COUNT, description="Tokens per window.")
    stride: int = Field(
        default=512,
        ge=1,
        le=MAX_COUNT,
        description="Tokens from the start of one window to the start of the next.",
    )
    max_rows: int | None = Field(
        default=None, ge=1, le=MAX_COUNT, description="Windows; null: all of the text."
    )
    reference: Name | None = Field(
        default=None,
        description="Label of the entry that the others' KL divergence is measured from.",
    )
    top_k: int = Field(
        default=32,
        ge=1,
        le=256,
        description="Most likely tokens that the KL divergence is computed from; the rest counts "
        "as one.",
    )
    entries: Annotated[tuple[Entry, ...], Tuple] = Field(
        min_length=1, description="What is compared."
    )

    @model_validator(mode="after")
    def _check(self) -> Spec:
        if self.stride >= self.context:
            raise key_error("stride", f"{self.stride} must be less than the context {self.context}")
        keys = [
            (label, f"entries.{index}")
            for index, entry in enumerate(self.entries)
            for label, _ in entry.labelled()
        ]
        counts = Counter(label for label, _ in keys)
        for label, key in reversed(keys):
            if counts[label] > 1:
                raise key_error(key, f"{label!r} is the label of two entries: give one another")
        for index, entry in enumerate(self.entries):
            if entry.reference is not None and entry.reference not in counts:
                raise key_error(f"entries.{index}.reference", _no_label(entry.reference, counts))
        if self.reference is not None and self.reference not in counts:
            raise key_error("reference", _no_label(self.reference, counts))
        return self


@dataclass(frozen=True, slots=True)
class Planned:
    """A request of a spec. `reference`: the label that it is compared with, never its own."""

    request: PerplexityRequest
    reference: str | None
    key: str  # where it is in the spec, such as entries.0

    @property
    def label(self) -> str:
        return self.request.label


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """Raises ConfigError naming every problem."""
    return load_section(path, Spec, "spec")


def requests_of(spec: Spec) -> list[Planned]:
    """In the order of the spec."""
    planned = []
    for index, entry in enumerate(spec.entries):
        for label, quantization in entry.labelled():
            reference = entry.reference or spec.reference
            planned.append(
                Planned(
                    _request(spec, entry, label, quantization),
                    None if reference == label else reference,
                    f"entries.{index}",
                )
            )
    wanted = {plan.reference for plan in planned} - {None}
    for plan in planned:
        if plan.label in wanted and plan.reference is not None:
            raise ConfigError(
                f"{plan.label!r} is a reference and has one itself, {plan.reference!r}: an entry "
                "is one or the other"
            )
    return [
        Planned(plan.request.model_copy(update={"top_k": spec.top_k}), plan.reference, plan.key)
        if plan.reference or plan.label in wanted
        else plan
        for plan in planned
    ]


def _request(spec: Spec, entry: Entry, label: str, quantization: str) -> PerplexityRequest:
    is_own_engine = "engine" in entry.model_fields_set
    merged: dict[str, Any] = {**thaw(spec.settings), **thaw(entry.settings)}
    return PerplexityRequest(
        label=label,
        family=entry.family_name,
        model=entry.model,
        quantization=quantization,
        dtype=entry.dtype,
        engine=entry.engine if is_own_engine else spec.engine,
        settings=merged,
        data=spec.data,
        column=spec.column,
        context=spec.context,
        stride=spec.stride,
        max_rows=spec.max_rows,
    )


def _no_label(label: str, labels: Counter[str]) -> str:
    return f"no entry is called {label!r}; there are {', '.join(map(repr, labels))}"
