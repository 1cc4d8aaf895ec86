"""The Python door: a job is run and its results are read from a program."""

from __future__ import annotations

import datetime
import decimal
import gc
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchinfer
from batchinfer import errors
from batchinfer.config import load_job
from batchinfer.engine.kinds import KINDS
from batchinfer.prompt import encode
from batchinfer.testing import FakePlan, LightTokenizer
from tests.support.fake_run import fake_kinds
from tests.support.jobs import ROOT, Place, job, results, rows, run, stable, write_job

PUBLIC = ["BatchInferError", "Job", "Outcome", "__version__", "run", "scan"]


@pytest.fixture(autouse=True)
def fake_engine() -> Iterator[None]:
    with (
        mock.patch.object(encode, "_load", lambda path, **_: LightTokenizer(path)),
        mock.patch.dict(KINDS, fake_kinds(FakePlan())),
    ):
        yield


@pytest.fixture
def settings(folder: Place) -> dict[str, Any]:
    for name, first in (("b", 0), ("a", 40)):
        folder.write_parquet(f"in/day=1/{name}[1].parquet", rows(40, start=first))
    return job(folder, input={"path": folder.url("in")})


def test_the_public_names_are_these() -> None:
    assert batchinfer.__all__ == PUBLIC
    assert all(hasattr(batchinfer, name) for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(batchinfer))
    with pytest.raises(AttributeError):
        _ = batchinfer.nothing  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_else() -> None:
    program = (
        "import sys, batchinfer; print([m for m in sys.modules if m.startswith('batchinfer.')])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr


@pytest.mark.parametrize("kind", ["path", "dict", "job"])
def test_a_job_in_any_form_gives_what_the_command_gives(
    folder: Place, tmp_path: Path, settings: dict[str, Any], kind: str
) -> None:
    path = write_job(tmp_path, settings)
    given = {"path": path, "dict": settings, "job": load_job(path).job}[kind]
    outcome = batchinfer.run(given)
    assert (outcome.status, outcome.exit_code) == ("complete", 0)
    have = batchinfer.scan(folder.url("out")).collect()
    assert have["shard"].unique(maintain_order=True).to_list() == [
        "day=1/a[1].parquet",
        "day=1/b[1].parquet",
    ]
    assert have.select("shard", "row", "sample").equals(
        have.select("shard", "row", "sample").sort("shard", "row", "sample")
    )
    reference = job(folder, input={"path": folder.url("in")}, output="other")
    assert run(write_job(tmp_path, reference, "other.yaml")).code == 0
    assert stable(have).equals(stable(batchinfer.scan(folder.url("other")).collect()))


def test_the_options_are_those_of_the_command(folder: Place, settings: dict[str, Any]) -> None:
    limited = batchinfer.run(settings, limit=10)
    assert (limited.status, limited.rows_durable) == ("partial", 10)
    first = batchinfer.run(settings, slice=(1, 2))
    assert (first.status, first.exit_code) == ("partial", 0)
    assert batchinfer.scan(folder.url("out")).collect().height == 40
    whole = batchinfer.run(settings)
    assert whole.status == "complete" and whole.totals is not None and whole.totals.rows == 80
    with pytest.raises(errors.ConfigError, match=r"sampling.max_tokens: was 16, is 3"):
        batchinfer.run(settings, overrides={"sampling.max_tokens": 3})
    again = batchinfer.run(settings, overrides={"sampling.max_tokens": 3}, restart=True)
    assert again.status == "complete"
    assert batchinfer.scan(folder.url("out")).collect()["num_completion_tokens"].max() == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"limit": 0}, "limit 0 is not"),
        ({"limit": 1.5}, "limit 1.5 is not"),
        ({"limit": "3"}, "limit '3' is not"),
        ({"slice": (3, 2)}, "slice (3, 2) is not"),
        ({"slice": (1.5, 3)}, "slice (1.5, 3) is not"),
        ({"slice": 1}, "slice 1 is not"),
        ({"slice": "1/2"}, "slice '1/2' is not"),
        ({"slice": (1, 2, 3)}, "slice (1, 2, 3) is not"),
        ({"slice": (1, 2), "restart": True}, "restart concerns the whole output"),
        ({"restart": "no"}, "restart must be True or False, not 'no'"),
        ({"retry_failed": 1}, "retry_failed must be True or False, not 1"),
        ({"overrides": {"input.path": Path("in")}}, "overrides: input.path: "),
        ({"overrides": {"x.y": 1}}, "overrides x.y: unknown key"),
        ({"overrides": {"sampling.max_tokens": 0}}, "overrides: sampling.max_tokens: must be"),
        ({"overrides": {3: 1}}, "overrides: 3 is not a dotted key"),
        ({"overrides": {"a=b": 1}}, "overrides: 'a=b' is not a dotted key"),
        ({"overrides": "a=b"}, "overrides must be a dict"),
        ({"overrides": 0}, "overrides must be a dict"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_their_names(
    settings: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        batchinfer.run(settings, **options)
    assert sentence in str(caught.value) and "--set" not in str(caught.value)


@pytest.mark.parametrize("given", [3, None, b"out", "a\0b"])
def test_what_can_be_no_output_is_refused(given: Any) -> None:
    with pytest.raises(errors.ConfigError, match="output must be a folder"):
        batchinfer.scan(given)


@pytest.mark.parametrize("given", [3, None, b"job.yaml", [("version", 1)]])
def test_what_is_not_a_job_is_refused(given: Any) -> None:
    with pytest.raises(errors.ConfigError, match="job must be a job file's path"):
        batchinfer.run(given)


def test_a_dict_for_a_section_overrides_the_keys_it_has(
    folder: Place, settings: dict[str, Any]
) -> None:
    settings["sampling"]["seed"] = 5
    batchinfer.run(settings, overrides={"sampling": {"max_tokens": 3}})
    with pytest.raises(errors.ConfigError) as caught:
        batchinfer.run(settings, overrides={"sampling": {"seed": 6, "max_tokens": 3}})
    assert "sampling.seed: was 5, is 6" in str(caught.value)
    assert "max_tokens" not in str(caught.value)
    assert "restart=True" in str(caught.value)


def test_every_problem_of_a_dict_is_named(settings: dict[str, Any]) -> None:
    settings["sampling"]["max_tokens"] = 0
    settings["nothing"] = 1
    with pytest.raises(errors.ConfigError) as caught:
        batchinfer.run(settings)
    assert "sampling.max_tokens" in str(caught.value) and "nothing" in str(caught.value)


def test_a_run_leaves_the_process_as_it_was(
    folder: Place, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    num_frozen = gc.get_freeze_count()
    batchinfer.run(settings)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert gc.isenabled() and gc.get_freeze_count() == num_frozen
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger().handlers or logging.getLogger("batchinfer").handlers == []
    assert "logs" not in {Path(name).parts[1] for name in folder.names("out") if "/" in name}


def test_max_seconds_ends_a_run_and_keeps_what_is_finished(
    folder: Place, settings: dict[str, Any]
) -> None:
    slow = fake_kinds(FakePlan(step_s=0.05, max_num_seqs=4))
    with mock.patch.dict(KINDS, slow), pytest.raises(errors.Stopped, match="max_seconds"):
        batchinfer.run(settings, overrides={"limits.max_seconds": 3})
    assert [name for name in folder.names("out") if name.endswith(".part")]
    assert batchinfer.run(settings).status == "complete"


def test_an_output_that_another_run_works_on_is_refused_by_name(settings: dict[str, Any]) -> None:
    with (
        mock.patch(
            "batchinfer.runner.take_over.acquire_lease", side_effect=errors.LeaseHeld("held")
        ),
        pytest.raises(errors.LeaseHeld),
    ):
        batchinfer.run(settings)


def test_an_output_has_its_columns_before_its_rows(folder: Place, settings: dict[str, Any]) -> None:
    batchinfer.run(settings, limit=1)
    empty = batchinfer.scan(folder.url("out")).collect()
    assert empty.height == 0
    batchinfer.run(settings)
    assert batchinfer.scan(folder.url("out")).collect_schema() == empty.schema


def test_what_is_not_an_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="not an output"):
        batchinfer.scan(tmp_path)


def test_finished_rows_are_read_from_any_store(place: Place, tmp_path: Path) -> None:
    place.write_parquet("in/a.parquet", rows(30))
    place.write_parquet("in/b.parquet", rows(30, start=30))
    path = write_job(tmp_path, job(place))
    assert run(path, place=place).code == 0
    with mock.patch.dict("os.environ", place.environ):
        frame = batchinfer.scan(path)
        assert stable(frame.collect()).equals(stable(results(place)))
        some = frame.filter(pl.col("row") >= 28).select("shard", "row").collect()
        first = frame.select("shard", "row").head(31).collect()
    assert some.rows() == [(s, r) for s in ("a.parquet", "b.parquet") for r in (28, 29)]
    assert first.rows()[-1] == ("b.parquet", 0)


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    code, examining = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BATCHINFER__OUTPUT__PATH", str(tmp_path / "out"))
    monkeypatch.setenv("BATCHINFER__PROMPT", '{"column": "description", "messages": null}')
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.startswith("complete 1200\n")
    assert "completion" in printed
    exec(examining, {})
    assert capsys.readouterr().out == "4 files, 1200 rows\nComplete\n"


@pytest.mark.parametrize("is_finished", [True, False])
def test_kept_columns_of_types_that_polars_lacks_are_given_as_others(
    folder: Place, is_finished: bool
) -> None:
    instants = pa.array([0, None], pa.timestamp("us", "+05:30"))
    long = decimal.Decimal("1" * 45 + ".5")
    columns = {
        "id": pa.array(["a", "b"]),
        "text": pa.array(["one", "two"]),
        "at": instants,
        "deep": pa.ListArray.from_arrays([0, 1, 2], pa.StructArray.from_arrays([instants], ["at"])),
        "zulu": pa.array([0, None], pa.timestamp("ms", "Z")),
        "wide": pa.array([decimal.Decimal("1.5"), None], pa.decimal256(38, 1)),
        "long": pa.array([long, None], pa.decimal256(50, 1)),
    }
    Path(folder.url("in")).mkdir(parents=True)
    pq.write_table(pa.table(columns), folder.url("in", "a.parquet"))
    kept = [name for name in columns if name not in ("id", "text")]
    settings = job(folder, input={"keep_columns": kept})
    batchinfer.run(settings, **({} if is_finished else {"limit": 1}))
    frame = batchinfer.scan(folder.url("out"))
    utc = pl.Datetime("us", "UTC")
    types = [utc, pl.List(pl.Struct({"at": utc})), pl.Datetime("ms", "UTC")]
    schema = frame.collect_schema()
    assert [schema[name] for name in kept] == [*types, pl.Decimal(38, 1), pl.String]
    have = frame.select("long", "at", "wide", "deep").collect()
    if is_finished:
        epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        wide = decimal.Decimal("1.5")
        assert have.rows() == [
            (str(long), epoch, wide, [{"at": epoch}]),
            (None, None, None, [{"at": None}]),
        ]
    assert frame.filter(pl.col("id") == "b").collect().height == int(is_finished)
