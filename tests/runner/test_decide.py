"""A decision follows from what was seen, and nothing is read or written for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchinfer.config import load_job
from batchinfer.errors import ConfigError
from batchinfer.ledger import Survey
from batchinfer.runner import RunOptions
from batchinfer.runner.decide import Complete, Refused, Restart, Resume, accepted, decide
from batchinfer.runner.digest import complete_digest
from batchinfer.runner.look import OutputView, Remains, RunRecord, look
from batchinfer.runner.ownership import Neighbours, Origin
from batchinfer.runner.start import Start, open_start
from batchinfer.source import Fingerprint
from tests.support.jobs import Place, job, rows, write_job

NAMES = frozenset({"a.parquet", "b.parquet"})


@pytest.fixture
def start(folder: Place, tmp_path: Path) -> Start:
    for name in sorted(NAMES):
        folder.write_parquet(f"in/{name}", rows(3))
    return open_start(load_job(write_job(tmp_path, job(folder))).job)


@pytest.fixture
def nothing(start: Start) -> OutputView:
    return look(start)


def begun(start: Start, view: OutputView) -> OutputView:
    record = {
        "digest": "older",
        "window_rows": 64,
        "first_run": 3,
        "ingredients": start.identity.ingredients,
        "job": start.job.model_dump(mode="json"),
    }
    return replace(view, record=record, survey=Survey(with_parts=frozenset({"a.parquet"})))


def with_success(start: Start, view: OutputView) -> OutputView:
    success = {"rows": 6, "rows_failed": 0, "prompt_tokens": 1, "completion_tokens": 1}
    digest = complete_digest("older", start.shards)
    return replace(view, success={**success, "digest": digest}, survey=Survey(finished=NAMES))


def test_a_new_output_is_begun(start: Start, nothing: OutputView) -> None:
    decision = decide(start, nothing)
    assert decision == Resume(start.identity.digest, 64, 1, {}, None, is_recorded=False)


def test_an_output_of_this_job_is_continued_under_its_own_digest(
    start: Start, nothing: OutputView
) -> None:
    decision = decide(start, begun(start, nothing))
    assert isinstance(decision, Resume) and not isinstance(decision, Restart)
    assert (decision.digest, decision.first_run, decision.is_recorded) == ("older", 3, True)


def test_a_complete_output_is_complete(start: Start, nothing: OutputView) -> None:
    whole = with_success(start, begun(start, nothing))
    decision = decide(start, whole)
    assert isinstance(decision, Complete) and decision.totals.rows == 6
    left = replace(whole, survey=Survey(finished=NAMES, with_parts=frozenset({"a.parquet"})))
    assert not isinstance(decide(start, left), Complete)
    again = replace(start, options=RunOptions(retry_failed=True))
    assert not isinstance(decide(again, whole), Complete)


def test_a_restart_deletes_only_what_is_this_outputs(start: Start, nothing: OutputView) -> None:
    pending = begun(start, nothing).record
    doomed = replace(begun(start, nothing), is_restarting=True, pending=pending)
    own = {"a.parquet": Origin("older", "a.parquet")}
    assert isinstance(decide(start, replace(doomed, origins=own)), Restart)
    strange = replace(doomed, origins=own | {"x.parquet": Origin()})
    refused = decide(start, strange)
    assert isinstance(refused, Refused) and "x.parquet" in str(refused.error)
    of_slice = decide(replace(start, options=RunOptions(slice=(1, 2))), doomed)
    assert isinstance(of_slice, Refused) and "without --slice" in str(of_slice.error)


def test_what_cannot_be_continued_is_refused_with_the_reason(
    start: Start, nothing: OutputView
) -> None:
    settings = start.job.model_dump(mode="json")
    settings["sampling"]["max_tokens"] = 3
    seen = begun(start, nothing)
    assert seen.record is not None
    other = replace(seen, record={**seen.record, "job": settings})
    lost = replace(seen, record=None, remains=Remains(frozenset({("theirs", 64)}), frozenset()))
    views = {
        "sampling.max_tokens: was 3, is 16": other,
        "job.json is missing": lost,
        "is not a result of this job": replace(seen, origins={"c.parquet": Origin("theirs")}),
        "is inside another output": replace(nothing, neighbours=Neighbours(above="/above")),
        "is an output of its own": replace(nothing, neighbours=Neighbours(below="/out/below")),
    }
    for why, view in views.items():
        decision = decide(start, view)
        assert isinstance(decision, Refused) and why in str(decision.error), why
        with pytest.raises(ConfigError, match=why.split(":")[0]):
            accepted(decision)


def test_a_lost_record_is_made_again_from_what_parts_and_runs_say(
    start: Start, nothing: OutputView
) -> None:
    own = start.identity.digest
    shards = tuple(_fingerprints(start))
    view = replace(
        begun(start, nothing),
        record=None,
        remains=Remains(frozenset({(own, 32)}), frozenset({"schema"})),
        runs=(RunRecord(1, own, shards),),
    )
    decision = decide(start, view)
    assert isinstance(decision, Resume)
    assert (decision.window_rows, decision.first_run, decision.is_recorded) == (32, 1, False)
    assert decision.known.keys() == NAMES


def _fingerprints(start: Start) -> list[Fingerprint]:
    return [Fingerprint(s.name, s.size_bytes, s.version, 3, "x") for s in start.shards]
