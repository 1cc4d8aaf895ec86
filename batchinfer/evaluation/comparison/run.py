"""A comparison from its requests to its records, references first.

Must not know: specs' syntax, terminals, how anything is measured or drawn. Invariant: each entry
comes to exactly one record, with figures or with its error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from batchinfer import __version__
from batchinfer.errors import BatchInferError, ConfigError, TransientError, exit_code_of
from batchinfer.evaluation.comparison.cache import Cache, Measured, Slot, key_of
from batchinfer.evaluation.comparison.children import CHILD, Failure, measure_in_child
from batchinfer.evaluation.comparison.spec import Planned
from batchinfer.evaluation.record import Record

_PARTIAL = 3


class Report(Protocol):
    """Where progress is reported to."""

    def begins(self, label: str, log: Path) -> None: ...

    def ends(self, record: Record, *, is_cached: bool) -> None: ...

    def warns(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it. `exit_code`: 0; 75 if another start may do better; 3 if it would not."""

    records: tuple[Record, ...]
    exit_code: int
    message: str = ""


def choose(planned: Sequence[Planned], patterns: Sequence[str]) -> list[Planned]:
    """Those whose label matches one of the globs; all without any. Raises ConfigError if none."""
    if not patterns:
        return list(planned)
    chosen = [
        plan
        for plan in planned
        # A label may itself have brackets or stars.
        if plan.label in patterns or any(fnmatchcase(plan.label, glob) for glob in patterns)
    ]
    if not chosen:
        labels = ", ".join(repr(plan.label) for plan in planned)
        raise ConfigError(f"--filter {' '.join(patterns)} matches no label; there are {labels}")
    return chosen


def needed(planned: Sequence[Planned], shown: Sequence[Planned]) -> list[Planned]:
    """What is shown and what that refers to, references first."""
    wanted = {plan.reference for plan in shown}
    found = [plan for plan in planned if plan in shown or plan.label in wanted]
    return sorted(found, key=lambda plan: plan.label not in wanted)


def compare(
    planned: Sequence[Planned],
    shown: Sequence[Planned],
    cache: Cache,
    report: Report,
    *,
    is_cleared: bool = False,
    program: Sequence[str] = CHILD,
) -> Comparison:
    """Measure `planned`, what is `needed`. `is_cleared`: forget what is kept of it first.

    Raises LeaseHeld, before anything is deleted or computed, if another comparison is at work on an
    entry of it.
    """
    run = _Run(cache, report, program)
    run.find_keys(planned)
    with cache.held(run.uses(planned, is_cleared=is_cleared)):
        if is_cleared:
            cache.clear(set(run.keys.values()))
        for plan in planned:
            run.measure(plan, planned)
    records = tuple(run.records[plan.label] for plan in shown)
    _warn_of_other_tokens(records, report)
    failed = [plan.label for plan in planned if run.records[plan.label].error is not None]
    if not failed:
        return Comparison(records, 0)
    is_passing = any(run.codes[label] == TransientError.exit_code for label in failed)
    advice = "start again: finished windows are kept" if is_passing else "see the table"
    return Comparison(
        records,
        TransientError.exit_code if is_passing else _PARTIAL,
        f"{len(failed)} of {len(planned)} entries failed: {', '.join(failed)} ({advice})",
    )


@dataclass
class _Run:
    cache: Cache
    report: Report
    program: Sequence[str]
    keys: dict[str, str] = field(default_factory=dict)  # label -> slot
    records: dict[str, Record] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)  # of those that failed

    def find_keys(self, planned: Sequence[Planned]) -> None:
        for plan in planned:
            try:
                self.keys[plan.label] = key_of(plan.request)
            except BatchInferError as error:
                self._fail(plan, Failure(str(error), exit_code_of(error)))

    def uses(self, planned: Sequence[Planned], *, is_cleared: bool) -> dict[str, bool]:
        """Slot -> whether it is written, not only read, as that of a finished reference is."""
        found: dict[str, bool] = {}
        for plan in planned:  # references first
            if (key := self.keys.get(plan.label)) is None:
                continue
            reference_key = self.keys.get(plan.reference) if plan.reference else None
            kept = self._kept(plan, reference_key, planned)
            # Of a reference that fails after all, the entry is measured without one.
            may_fail = reference_key is not None and found[reference_key]
            found[key] = found.get(key, False) or is_cleared or kept is None or may_fail
        return found

    def measure(self, plan: Planned, planned: Sequence[Planned]) -> None:
        if plan.label in self.records:
            return  # failed above
        slot = self.cache.slot(self.keys[plan.label])
        reference = self._reference(plan)
        reference_key = self.keys[plan.reference] if plan.reference and reference else None
        measured = self._kept(plan, reference_key, planned)
        is_cached = measured is not None
        if measured is None:
            self.report.begins(plan.label, slot.log)
            outcome = self._compute(plan, slot, reference)
            if isinstance(outcome, Failure):
                self._fail(plan, outcome)
                return
            measured = outcome
            slot.write(measured, reference_key)
        for text in measured.warnings if is_cached else ():
            self.report.warns(f"{plan.label}: {text}")
        self.records[plan.label] = measured.record
        self.report.ends(measured.record, is_cached=is_cached)

    def _kept(
        self, plan: Planned, reference_key: str | None, planned: Sequence[Planned]
    ) -> Measured | None:
        """What was measured before. Of a reference that is needed, None without its output."""
        slot = self.cache.slot(self.keys[plan.label])
        measured = slot.read(plan, reference_key)
        if measured is None or slot.has_output:
            return measured
        key = self.keys[plan.label]
        of_it = [other for other in planned if other.reference == plan.label]
        is_needed = any(
            other.label in self.keys
            and self.cache.slot(self.keys[other.label]).read(other, key) is None
            for other in of_it
        )
        return None if is_needed else measured

    def _reference(self, plan: Planned) -> Path | None:
        """The finished output of the entry's reference."""
        if plan.reference is None:
            return None
        if self.records[plan.reference].error is not None:
            self.report.warns(
                f"{plan.label}: no KL divergence, as its reference {plan.reference} failed"
            )
            return None
        return self.cache.slot(self.keys[plan.reference]).output

    def _compute(self, plan: Planned, slot: Slot, reference: Path | None) -> Measured | Failure:
        request = plan.request.model_copy(
            update={"reference": str(reference) if reference else None}
        )
        warnings: list[str] = []

        def warn(text: str) -> None:
            warnings.append(text)
            self.report.warns(f"{plan.label}: {text}")

        found = measure_in_child(request, slot.work, slot.log, self.program, warn)
        if isinstance(found, Failure):
            return found
        names = {"reference": plan.reference if reference else None}
        return Measured(found.model_copy(update=names), tuple(warnings))

    def _fail(self, plan: Planned, failure: Failure) -> None:
        record = Record(
            label=plan.label,
            family=plan.request.family,
            model=plan.request.model,
            error=failure.message,
            batchinfer_version=__version__,
        )
        self.records[plan.label] = record
        self.codes[plan.label] = failure.exit_code
        self.report.ends(record, is_cached=False)


def _warn_of_other_tokens(records: Sequence[Record], report: Report) -> None:
    """Perplexities of other tokenizers are of other tokens."""
    by_digest: dict[str, str] = {}
    for record in records:
        if record.data_digest is not None:
            by_digest.setdefault(record.data_digest, record.label)
    if len(by_digest) > 1:
        labels = " and ".join(by_digest.values())
        report.warns(
            f"{labels} have other tokenizers, so their perplexities cannot be compared: look at "
            "bits per byte"
        )
