"""A model as somebody who chooses one wants to see it: what it is, and how it can run here.

Must not know: what anybody is asked. Loads no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from batchinfer.config import Job
from batchinfer.engine.kinds import engine_kind
from batchinfer.errors import ConfigError
from batchinfer.model import ModelFacts, has_chat_template
from batchinfer.quantization import TABLE, for_this_machine
from batchinfer.runner.factory import engine_spec, model_of


@dataclass(frozen=True, slots=True)
class ModelLook:
    """`names`: each quantization that this machine can run this model in, and how it comes to it.

    `memory`: lines on what it needs and what there is.
    """

    facts: ModelFacts
    names: Mapping[str, str]
    can_chat: bool
    memory: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        facts = self.facts
        chats = "has a chat template" if self.can_chat else "no chat template: it continues texts"
        yield f"context {facts.max_model_len:,} tokens, {chats}"
        yield f"it is {_called(facts.quantization)}, and computes in {facts.dtype} here"
        yield from facts.notes
        others = [f"{name} ({how})" if how else name for name, how in self.names.items()]
        yield f"this machine runs it as {', '.join(others)}"
        yield from (f"memory: {line}" for line in self.memory)


def _called(quantization: str) -> str:
    return "unquantized" if quantization == "none" else f"quantized as {quantization}"


def look_at_model(job: Job, names: Mapping[str, str] | None = None) -> ModelLook:
    """`names`: those of the same model, where they are known. Raises ConfigError."""
    facts = model_of(job)
    kind = engine_kind(job.engine.name)
    return ModelLook(
        facts,
        _names(job) if names is None else names,
        has_chat_template(Path(facts.tokenizer_path)),
        tuple(kind.describe_memory(engine_spec(job, facts))),
    )


def _names(job: Job) -> dict[str, str]:
    machine = engine_kind(job.engine.name).machine()
    names = {}
    for record in TABLE:
        if not for_this_machine(record, machine)[0]:
            continue
        model = job.model.model_copy(update={"quantization": record.name, "dtype": "auto"})
        try:
            facts = model_of(job.model_copy(update={"model": model}))
        except ConfigError:  # not of this checkpoint
            continue
        names[record.name] = _how(facts)
    return names


def _how(facts: ModelFacts) -> str:
    if facts.made_by is not None:
        return "made once"
    return "on the fly" if facts.engine_quantization is not None else ""
