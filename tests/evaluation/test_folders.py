"""What others have written is not touched by an evaluation, and mistakes are said before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from batchinfer.config import load_job
from batchinfer.errors import ConfigError
from batchinfer.evaluation import PerplexityRequest
from batchinfer.evaluation.folders import check_out, check_work, local_folder, make_work
from batchinfer.evaluation.outputs import read_output
from batchinfer.evaluation.perplexity import default_work, measure
from batchinfer.evaluation.windows import TokenStream, make_windows
from tests.support.cpus import HAS_BFLOAT16
from tests.support.in_process import run_here
from tests.support.jobs import MODEL, ROOT, Place, job, rows, run, write_job


def request(text: Path, **changes: Any) -> PerplexityRequest:
    asked = {"label": "a", "model": str(MODEL), "data": str(text), "context": 16, "stride": 4}
    return PerplexityRequest(**{**asked, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with the finished output of a job, at `output`, and the job's file."""
    place = Place(str(tmp_path / "made"))
    place.write_parquet("in/a.parquet", rows(4))
    assert run_here(write_job(Path(place.root), job(place, "output"))).code == 0
    return Path(place.root)


@pytest.mark.parametrize("below", ["output", "output/new/deep"])
def test_an_evaluation_is_not_written_into_the_output_of_a_job(
    made: Path, below: str, text: Path
) -> None:
    before = files(made)
    for check in (check_work, check_out):
        with pytest.raises(ConfigError, match="an output of a job: give a new folder"):
            check(made / below)
    with pytest.raises(ConfigError, match="an output of a job"):
        measure(request(text), work=made / below, restart=True)
    assert files(made) == before
    read_output(str(made / "output"))


def test_a_folder_with_nothing_but_an_old_lease_is_not_an_output(tmp_path: Path) -> None:
    """Earlier versions left one where a start was refused."""
    lease = tmp_path / "_batchinfer/leases/all.lock"
    lease.parent.mkdir(parents=True)
    lease.touch()
    check_work(tmp_path / "below")
    (tmp_path / "_batchinfer/job.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an output of a job"):
        check_work(tmp_path)


def test_the_example_job_and_the_command_keep_their_results_in_different_places() -> None:
    windows = make_windows(TokenStream(np.arange(3, dtype=np.int32), np.arange(3)), 2, 1)
    work = default_work(PerplexityRequest(label="demo", model=str(MODEL)), {}, windows)
    of_job = Path(load_job(str(ROOT / "jobs/perplexity.yaml")).job.output.path)
    assert of_job not in [work, *work.parents]
    assert work not in of_job.parents


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("has_job_file", [True, False])
def test_a_restart_deletes_no_other_jobs_output(
    made: Path, text: Path, *, has_job_file: bool
) -> None:
    """Whose `output` is where that of a measurement would be."""
    if not has_job_file:
        for path in made.glob("*.yaml"):
            path.unlink()
    before = files(made)
    what = "job.yaml is not from a measurement" if has_job_file else "is another job's output"
    for restart in (False, True):
        with pytest.raises(ConfigError, match=what):
            measure(request(text), work=made, restart=restart)
    assert files(made) == before


def test_a_folder_of_other_files_is_not_a_work_folder(text: Path, tmp_path: Path) -> None:
    """Whatever they are called: a measurement would write over `record.json`."""
    for name in ("record.json", "engine.log", "windows/mine", ".hidden"):
        work = tmp_path / name.strip(".").replace("/", "-")
        (work / name).parent.mkdir(parents=True)
        (work / name).write_text("mine")
        before = files(tmp_path)
        ended = run(
            *(str(MODEL), "--data", str(text), "--context", "16", "--stride", "4"),
            *("--work", str(work)),
            command=("perplexity",),
        )
        assert ended.code == 2, ended.stderr
        assert f"--work {work}: that folder has {name.split('/')[0]}" in ended.stderr
        assert files(tmp_path) == before


def test_a_mistyped_call_leaves_no_folder(text: Path, tmp_path: Path) -> None:
    work = tmp_path / "new/work"
    for wrong in (
        ("--quantization", "int3"),
        ("--context", "100000"),
        ("--data", "no-such"),
        ("--set", "engine.options.no_such_option=1"),
        ("--reference", str(tmp_path)),
    ):
        ended = run(
            *(str(MODEL), "--data", str(text), "--context", "16", "--stride", "4"),
            *("--work", str(work), *wrong),
            command=("perplexity",),
        )
        assert ended.code == 2, ended.stderr
        assert "computing" not in ended.stderr
        assert not work.parent.exists(), wrong


@pytest.mark.usefixtures("fake")
def test_a_measurement_that_is_refused_leaves_the_job_of_the_one_before(
    text: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    first = measure(request(text), work=work)
    before = (work / "job.yaml").read_bytes()
    with pytest.raises(ConfigError, match="its output is for other windows"):
        measure(request(text, stride=8), work=work)
    with pytest.raises(ConfigError, match="with other settings"):
        measure(request(text, quantization="fp32" if HAS_BFLOAT16 else "bf16"), work=work)
    assert (work / "job.yaml").read_bytes() == before
    assert measure(request(text), work=work) == first
    other = measure(request(text, stride=8), work=work, restart=True)
    assert other.nll == measure(request(text, stride=8), work=tmp_path / "new").nll
    assert (work / "job.yaml").read_bytes() != before


@pytest.mark.parametrize("name", ["results.json", "results.parquet", "comparison.html", "job.yaml"])
def test_files_of_others_are_not_replaced_by_a_comparisons(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=f"{name} there is not from a comparison"):
        check_out(tmp_path)


def test_a_comparisons_own_results_are_replaced(tmp_path: Path) -> None:
    ours = {"title": "t", "batchinfer_version": "0", "records": []}
    (tmp_path / "results.json").write_text(json.dumps(ours))
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "results.parquet")
    check_out(tmp_path)


@pytest.mark.parametrize(("check", "make"), [(check_work, make_work), (check_out, check_out)])
def test_a_place_where_no_folder_can_be_is_a_mistake_of_the_caller(
    check: Any, make: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot be created"):
        make(Path("/proc/no/such"))
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match="file is not a folder"):
            check(folder)
    with pytest.raises(ConfigError, match="written to a local folder"):
        local_folder("--work", "s3://bucket/x")


def test_the_commands_check_before_they_write(made: Path, text: Path, tmp_path: Path) -> None:
    before = files(made)
    out = str(made / "output")
    ended = run(str(MODEL), "--data", str(text), "--work", out, command=("perplexity",))
    assert (ended.code, ended.stdout) == (2, ""), ended.stderr
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps({"data": str(text), "entries": [{"model": str(MODEL)}]}))
    ended = run(str(spec), "--out", out, command=("compare",))
    assert (ended.code, ended.stdout) == (2, ""), ended.stderr
    assert files(made) == before
