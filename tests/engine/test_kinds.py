"""An engine is chosen by the job, and the rest of the program asks its kind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchinfer.config import DEFAULT_ENGINE, ENGINES, load_job
from batchinfer.engine.kinds import KINDS, check_demand, engine_kind
from batchinfer.errors import ConfigError
from batchinfer.sink.parquet import file_facts
from batchinfer.tasks import task_of
from batchinfer.testing import fake_kind, register
from tests.support.jobs import ROOT, Place, job, results, rows, run, write_job


@pytest.fixture
def _fake_is_registered() -> Iterator[None]:
    register("fake", fake_kind())
    yield
    ENGINES.remove("fake")
    del KINDS["fake"]


def job_on(engine: str, place: Place, folder: Path, **changes: Any) -> Path:
    if not place.names("in"):
        place.write_parquet("in/a.parquet", rows(20))
    return write_job(folder, job(place, engine={"name": engine, **changes}))


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def test_each_engine_that_a_job_may_name_has_a_kind() -> None:
    folders = (ROOT / "batchinfer" / "engine").glob("*/kind.py")
    assert set(ENGINES) == {path.parent.name for path in folders}
    assert DEFAULT_ENGINE in ENGINES
    assert all(engine_kind(name) for name in ENGINES)


@pytest.mark.parametrize("name", ["fake", "sglang", ""])
def test_an_unknown_engine_is_refused_with_the_names_of_the_known(
    folder: Place, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.name: must be {_one_of(ENGINES)}, got"):
        load_job(job_on(name, folder, tmp_path))


@pytest.mark.usefixtures("_fake_is_registered")
def test_a_registered_engine_can_be_named(folder: Place, tmp_path: Path) -> None:
    assert load_job(job_on("fake", folder, tmp_path)).job.engine.name == "fake"
    assert ENGINES[-1] == "fake"
    words = rf"must be {_one_of(ENGINES)}, got .*did you mean fake"
    with pytest.raises(ConfigError, match=words):
        load_job(job_on("fakes", folder, tmp_path))


def test_a_job_runs_on_the_engine_that_it_names(folder: Place, tmp_path: Path) -> None:
    path = job_on("fake", folder, tmp_path)
    assert run(path).code == 0
    assert len(results(folder)) == 20
    facts = file_facts(pq.read_metadata(folder.url("out", "a.parquet")))
    assert facts is not None
    assert facts["engine"]["name"] == "fake"


@pytest.mark.parametrize("command", ["run", "validate", "plan"])
def test_each_command_asks_the_engine_that_the_job_names(
    folder: Place, tmp_path: Path, command: str
) -> None:
    """`enforce_eager` is an option of vLLM."""
    path = job_on("fake", folder, tmp_path, options={"enforce_eager": True})
    ended = run(path, command=(command,))
    assert ended.code == 2
    assert "engine.options.enforce_eager: the engine fake has no options" in ended.stderr
    assert run(job_on("vllm", folder, tmp_path, options={"enforce_eager": True})).code == 0


def test_an_output_is_not_continued_by_another_engine(folder: Place, tmp_path: Path) -> None:
    assert run(job_on("vllm", folder, tmp_path), "--limit", "5").code == 0
    ended = run(job_on("fake", folder, tmp_path))
    assert ended.code == 2
    assert 'engine.name: was "vllm", is "fake"' in ended.stderr


#: The command line where neither vLLM nor our own code about it can be imported.
WITHOUT_VLLM = """
import sys
sys.modules["batchinfer.engine.vllm"] = sys.modules["vllm"] = None
from batchinfer.cli import main
from batchinfer.prompt import encode
from batchinfer.testing import LightTokenizer, fake_kind, register
encode._load = lambda path, **_: LightTokenizer(path)
register("fake", fake_kind())
sys.argv[0] = "batchinfer"
main()
"""


def test_no_command_needs_an_engine_that_the_job_does_not_name(
    folder: Place, tmp_path: Path
) -> None:
    path = job_on("fake", folder, tmp_path)
    for command in ("doctor", "validate", "explain", "plan", "run"):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_VLLM, command, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert len(results(folder)) == 20


def test_an_engine_refuses_a_task_that_it_was_never_taught(
    folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would compute something else."""
    untaught = dataclasses.replace(fake_kind(), wants=("completion",))
    monkeypatch.setitem(KINDS, DEFAULT_ENGINE, lambda: untaught)
    generating = load_job(job_on(DEFAULT_ENGINE, folder, tmp_path)).job
    check_demand(generating, task_of(generating).demand)
    scoring = generating.model_copy(update={"task": "score"})
    with pytest.raises(ConfigError, match=r"engine\.name: vllm does not run task: score"):
        check_demand(scoring, task_of(scoring).demand)
