"""What a start will do with an output as it was seen: nothing, refuse, resume, or start over.

Pure: a decision follows from the start and the view alone. Must not know: storage, leases, whether
anybody acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import RESTART, BatchInferError, ConfigError
from batchinfer.ledger import Totals, layout
from batchinfer.runner.carried import RECORD_KEY
from batchinfer.runner.digest import complete_digest
from batchinfer.runner.look import OutputView
from batchinfer.runner.ownership import (
    refuse_foreign_files,
    refuse_neighbours,
    refuse_strangers,
)
from batchinfer.runner.restart import describe, refuse_other_restart
from batchinfer.runner.start import Start
from batchinfer.source import Fingerprint
from batchinfer.storage import join_url


@dataclass(frozen=True, slots=True)
class Complete:
    """Every row of the input has its result, computed for this job."""

    totals: Totals
    digest: str
    window_rows: int
    record: Mapping[str, Any] | None  # job.json; None: it is lost


@dataclass(frozen=True, slots=True)
class Refused:
    """The output is not this job's, or cannot be understood."""

    error: BatchInferError


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with what is there; with a new output that is nothing."""

    digest: str  # the one that the output was begun with
    window_rows: int
    first_run: int
    known: Mapping[str, Fingerprint]  # shards as they were when their rows were computed
    record: Mapping[str, Any] | None  # job.json, or what it said if it was lost; None: it is new
    is_recorded: bool  # job.json is there and stays as it is
    unrecorded: frozenset[str] = frozenset()  # those of `known` that only their parts say


@dataclass(frozen=True, slots=True)
class Restart(Resume):
    """Delete all results, then begin again. `known` and `record` are empty."""


Decision = Complete | Refused | Resume


def decide(start: Start, view: OutputView) -> Decision:
    try:
        return _complete(start, view) or _begin(start, view)
    except BatchInferError as error:
        return Refused(error)


def accepted(decision: Decision) -> Complete | Resume:
    """The decision, if it is not a refusal. Raises what it refuses for."""
    if isinstance(decision, Refused):
        raise decision.error
    return decision


def _complete(start: Start, view: OutputView) -> Complete | None:
    """None unless the output is complete for just this job and input."""
    if view.is_restarting or start.options.retry_failed or view.success is None:
        return None
    if view.record is not None and _changes(start, view, view.record):
        return None
    digest = _digest_in(view.record, start)
    if view.success.get("digest") != complete_digest(digest, start.shards):
        return None
    names = {shard.name for shard in start.shards}
    if names - view.survey.finished or names & view.survey.with_parts:
        return None
    rows = view.record["window_rows"] if view.record else start.job.packing.window_rows
    return Complete(Totals.from_facts(view.success), digest, int(rows), view.record)


def _begin(start: Start, view: OutputView) -> Resume:
    refuse_neighbours(view.url, view.neighbours)
    if view.is_restarting:
        return _restart(start, view)
    record = _binding_record(start, view)
    is_recorded = record is not None
    if view.record is None:
        record = _record_of_remains(start, view)
    digest = _digest_in(record, start)
    refuse_foreign_files(view.url, view.origins, digest)
    if record is None:
        next_run = view.survey.last_run + 1
        return Resume(digest, start.job.packing.window_rows, next_run, {}, None, is_recorded=False)
    first_run = int(record["first_run"])
    known = view.recorded_since(first_run)
    of_parts = {f.name: f for f in view.remains.inputs} if view.remains is not None else {}
    return Resume(
        digest=digest,
        window_rows=int(record["window_rows"]),
        first_run=first_run,
        known=of_parts | known,
        record=record,
        is_recorded=is_recorded,
        unrecorded=frozenset(of_parts.keys() - known.keys()),
    )


def _restart(start: Start, view: OutputView) -> Restart:
    """The restart of a start that asks for it, or of the job whose earlier restart was killed."""
    own = start.identity.digest
    if view.pending is not None and not start.options.restart:
        has_results = view.survey.has_results
        refuse_other_restart(view.url, view.pending, start.identity, has_results=has_results)
        if not start.options.is_whole:
            option = "--join" if start.options.join else "--slice"
            raise ConfigError(
                f"{describe(view.url, view.pending)}: start once without {option} to finish it"
            )
    digests = {own, *(run.digest for run in view.runs if run.digest is not None)}
    if view.record is not None and "digest" in view.record:
        digests.add(str(view.record["digest"]))
    refuse_strangers(view.url, view.origins, digests)
    next_run = view.survey.last_run + 1
    return Restart(own, start.job.packing.window_rows, next_run, {}, None, is_recorded=False)


def _binding_record(start: Start, view: OutputView) -> Mapping[str, Any] | None:
    """job.json, None if it does not bind this start. Raises ConfigError for another job's.

    A record of other settings without a single result does not bind a run on the whole input: what
    the first start could not know (the engine refused a setting) may be corrected in the job file.
    """
    record = view.record
    if record is None:
        return None
    changes = _changes(start, view, record)
    if start.options.is_whole and not view.survey.has_results:
        is_same = int(record["window_rows"]) == start.job.packing.window_rows
        return record if is_same and not changes else None
    if changes:
        raise other_settings(view.url, changes)
    return record


def _changes(start: Start, view: OutputView, record: Mapping[str, Any]) -> list[str]:
    """What differs from a job.json: settings, and weights of the same shape."""
    weights = [
        f"model.path: {_weights_file(start.model.path, name)} holds other weights than those it "
        "was begun with"
        for name in view.changed_weights
    ]
    return [*start.identity.changes_since(record), *weights]


def _weights_file(path: str, name: str) -> str:
    """`path`: a folder, or the first of the files that are themselves the model."""
    return path if path.endswith(f"/{name}") else f"{path}/{name}"


def other_settings(url: str, changes: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"the results in {url} were computed with other settings:\n  "
        + "\n  ".join(changes)
        + "\nSet it back or use another output.path; if nobody needs the old results, "
        f"{RESTART} deletes them"
    )


def _record_of_remains(start: Start, view: OutputView) -> dict[str, Any] | None:
    """What a job.json that somebody deleted said of the results that are left; None without any.

    Parts are never taken for another job's or another input's: where the footers of parts and the
    records of runs do not say enough, nothing is guessed. Raises ConfigError then.
    """
    if view.remains is None:
        return None
    own, parts_of = start.identity.digest, view.survey.with_parts
    window_rows = {rows if digest == own else 0 for digest, rows in view.remains.jobs}
    if not parts_of:
        window_rows.add(start.job.packing.window_rows)
    known = {s.name for run in view.runs if run.digest == own for s in run.shards}
    known |= {shard.name for shard in view.remains.inputs}
    if len(window_rows) != 1 or 0 in window_rows or not parts_of <= known:
        raise ConfigError(
            f"{join_url(view.url, layout.JOB_KEY)} is missing, and the parts of results that are "
            f"left below {join_url(view.url, layout.PARTS_PREFIX)} are another job's, or do not "
            "say of which input. Put it back, or choose another output.path; if nobody needs the "
            f"parts, {RESTART} deletes them"
        )
    record = {"digest": own, "window_rows": window_rows.pop(), "first_run": 1}
    schemas = list(view.remains.schemas)
    return record | ({RECORD_KEY: schemas[0]} if len(schemas) == 1 else {})


def _digest_in(record: Mapping[str, Any] | None, start: Start) -> str:
    """The digest of an output's files: the one that it was begun with, if it was."""
    return str(record["digest"]) if record else start.identity.digest
