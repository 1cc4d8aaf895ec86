"""The model of a job as its output has it.

What `auto` and a fallback mean depends on the machine, and an output is computed in one of them
from its first row to its last, wherever later starts take place. Must not know: what is done.
Invariant: nothing here writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchinfer.ledger import layout, records, survey
from batchinfer.model import ModelFacts
from batchinfer.quantization import Begun, Machine, lacks_arithmetic
from batchinfer.runner.factory import ModelReader
from batchinfer.storage import Store


def model_for(
    reader: ModelReader, store: Store, *, is_restart: bool = False, is_whole_input: bool = True
) -> ModelFacts:
    """Facts of the job's model, in the dtype and quantization in which its output was begun.

    Without an output, and where a restart deletes it, they are what this machine does best. A whole
    run is not bound by an output without results; a slice is, as others may be at work on it.
    Raises ConfigError, also if the output's cannot run here.
    """
    best = reader.read()
    begun = None if is_restart else _begun(store)
    if begun is None or begun == Begun(best.dtype, best.quantization):
        return best
    if is_whole_input and not _has_results(store):
        return best
    found = reader.read(begun)
    if (found.dtype, found.quantization) == (best.dtype, best.quantization):
        return best  # another job's output, which is refused for what it is
    return replace(found, warnings=(*found.warnings, _what_it_keeps(found, best, reader.machine)))


def differs_by_machine(changes: Sequence[str]) -> bool:
    """Whether what differs from an output's record is only what `auto` and a fallback may mean.

    `changes`: as `Identity.changes_since` names them.
    """
    names = ("model.dtype", "model.quantization", "model.content.made by")
    return all(change.partition(":")[0] in names for change in changes)


def _begun(store: Store) -> Begun | None:
    """What job.json says the output was begun with; None if it is missing or to be deleted."""
    record = records.read_job(store)
    if record is None or store.stat(layout.RESTART_KEY) is not None:
        return None
    model = record["ingredients"]["model"]
    return Begun(str(model.get("dtype")), str(model.get("quantization")))


def _has_results(store: Store) -> bool:
    return survey(store).has_results


def _what_it_keeps(found: ModelFacts, best: ModelFacts, machine: Machine) -> str:
    own, other = (Begun(model.dtype, model.quantization) for model in (found, best))
    slow = lacks_arithmetic(found.dtype, machine)
    return (
        f"the output was begun in {own} and stays so; a new output.path would be computed in "
        f"{other} here{f', which is faster: {slow}' if slow else ''}"
    )
