"""`engine.tune` in whole runs: what is found, what is said, what the next run does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, run, stable, write_job
from tests.support.knee import Uncounted, run_with_knee

#: A search takes about 1,500 of them.
NUM_ROWS = 3_500


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "batchinfer" / "widths"


def written(folder: Place, tmp_path: Path, num_rows: int = NUM_ROWS, output: str = "out") -> Path:
    folder.write_parquet("in/a.parquet", rows(num_rows))
    # Times are of a clock that stands still: parts are flushed by their rows alone.
    often = {"every_rows": 4096, "every_s": 1e6}
    large = {"window_rows": 4096}
    return write_job(
        tmp_path, job(folder, output, checkpoint=often, packing=large), f"{output}.yaml"
    )


def tuning(outcome: Any) -> dict[str, Any]:
    return dict(outcome.as_dict()["tuning"])


@pytest.mark.parametrize("can_narrow", [True, False], ids=["engine narrows", "loop admits fewer"])
def test_the_width_of_the_knee_is_found_said_and_kept(
    folder: Place, tmp_path: Path, cache: Path, can_narrow: bool
) -> None:
    outcome, engine = run_with_knee(written(folder, tmp_path), can_narrow=can_narrow)
    told = tuning(outcome)
    assert outcome.status == "complete"
    assert (told["by"], told["is_remembered"]) == ("search", True)
    assert 16 <= told["width"] <= 32
    assert told["gain"] > 0.3
    assert told["search_s"] <= 61
    assert f"{told['width']} sequences at once are" in told["text"]
    assert engine.most_running == 64, "the widest was measured too"
    assert outcome.mean_num_running < 48, "and the other rows ran at what was found"
    assert outcome.verdict is not None
    assert outcome.verdict["setting"] is None, "nobody is told to widen what was narrowed"
    record = json.loads(next(cache.glob("*.json")).read_text())
    assert record["width"] == told["width"]


def test_the_next_run_begins_with_what_an_earlier_one_found(folder: Place, tmp_path: Path) -> None:
    first, _ = run_with_knee(written(folder, tmp_path))
    again, engine = run_with_knee(written(folder, tmp_path, 200, output="again"))
    told = tuning(again)
    assert (told["by"], told["width"]) == ("memory", tuning(first)["width"])
    assert "as an earlier run found" in told["text"]
    assert engine.most_running == told["width"], "no step was wider"


def test_rows_that_turn_out_longer_than_those_of_the_earlier_run_are_searched(
    folder: Place, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_with_knee(written(folder, tmp_path))
    (memory,) = cache.glob("*.json")
    earlier = json.loads(memory.read_text()) | {"completion_tokens": 2.0}
    memory.write_text(json.dumps(earlier))
    with caplog.at_level("INFO", "batchinfer.runner"):
        again, _ = run_with_knee(written(folder, tmp_path, output="again"))
    assert tuning(again)["by"] == "search"
    assert "those of the earlier run had 2" in caplog.text
    assert json.loads(memory.read_text())["completion_tokens"] == pytest.approx(8.5, abs=1)


def test_rows_of_another_length_are_searched_for_themselves(folder: Place, tmp_path: Path) -> None:
    run_with_knee(written(folder, tmp_path))
    path = written(folder, tmp_path, 100, output="longer")
    other, _ = run_with_knee(path, sets=["sampling.max_tokens=64"])
    assert tuning(other)["by"] == "skipped", "nothing is remembered of them"


def test_a_damaged_memory_is_a_warning_and_a_search(
    folder: Place, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(folder, tmp_path)
    run_with_knee(path)
    (memory,) = cache.glob("*.json")
    memory.write_text("{")
    again, _ = run_with_knee(written(folder, tmp_path, output="again"))
    assert tuning(again)["by"] == "search"
    assert f"{memory} is ignored, as it is damaged" in caplog.text
    assert json.loads(memory.read_text())["width"] == tuning(again)["width"]


def test_a_cache_that_cannot_be_written_costs_only_the_memory(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    outcome, _ = run_with_knee(written(folder, tmp_path))
    told = tuning(outcome)
    assert (outcome.status, told["by"], told["is_remembered"]) == ("complete", "search", False)


@pytest.mark.parametrize(
    ("num_rows", "why"),
    [(150, "150 rows are left, and a search takes at least"), (400, "the rows that are left take")],
)
def test_a_job_shorter_than_the_search_is_run_as_without_it(
    folder: Place, tmp_path: Path, cache: Path, num_rows: int, why: str
) -> None:
    outcome, engine = run_with_knee(written(folder, tmp_path, num_rows))
    told = tuning(outcome)
    assert (told["by"], told["width"]) == ("skipped", 64)
    assert why in told["text"]
    assert engine.most_running == 64
    assert not list(cache.glob("*")), "nothing was found"


def test_an_engine_that_does_not_tell_its_steps_is_not_searched(
    folder: Place, tmp_path: Path
) -> None:
    outcome, _ = run_with_knee(written(folder, tmp_path), kind=Uncounted)
    told = tuning(outcome)
    assert (told["by"], told["width"]) == ("skipped", 64)
    assert "does not tell its steps" in told["text"]


def test_the_rows_are_those_of_an_untuned_run(folder: Place, tmp_path: Path) -> None:
    path = written(folder, tmp_path)
    outcome, _ = run_with_knee(path)
    assert outcome.status == "complete"
    plain = written(folder, tmp_path, output="plain")
    assert run_here(plain).code == 0
    assert stable(results(folder)).equals(stable(results(folder, "plain")))


def test_each_replica_searches_for_itself_and_all_are_told(folder: Place, tmp_path: Path) -> None:
    """Theirs are few rows here: each skips it, and says so."""
    folder.write_parquet("in/a.parquet", rows(400))
    path = write_job(tmp_path, job(folder, engine={"name": "fake", "devices": 2, "tune": True}))
    ended = run(path, fake={"max_num_seqs": 64, "step_s": 0.001})
    assert ended.code == 0, ended.stderr
    told = ended.result["tuning"]
    assert {label: one["by"] for label, one in told["replicas"].items()} == {
        "fake 0": "skipped",
        "fake 1": "skipped",
    }
    assert "fake 0: skipped" in told["text"]


def test_without_the_setting_nothing_is_told(folder: Place, tmp_path: Path) -> None:
    folder.write_parquet("in/a.parquet", rows(20))
    ended = run(write_job(tmp_path, job(folder)))
    assert ended.result["tuning"] is None
