"""Two small jobs of generation whose finished files are kept: times and timing are fixed.

`python -m tests.support.golden` writes tests/data/golden anew: only when a finished file is meant
to change, or pyarrow did.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import polars as pl
import pyarrow as pa

from batchinfer.config import load_job
from batchinfer.engine.kinds import KINDS
from batchinfer.prompt import encode
from batchinfer.runner import Host, RunOptions, run_job
from batchinfer.telemetry import Clock, Counters
from batchinfer.testing import FakePlan, LightTokenizer
from tests.support.fake_run import fake_kinds
from tests.support.jobs import ROOT, Place, job, write_job

GOLDEN = ROOT / "tests" / "data" / "golden"
#: What wrote the files; another version may encode the same table into other bytes.
WRITTEN_BY = GOLDEN / "written_by.json"
#: Relative: the footer repeats it.
_MODEL = {"path": "jobs/demo/model", "dtype": "float32", "max_model_len": 40}
_WALL_NS = 1_700_000_000_000_000_000
_SCHEMA = {"type": "object"}
#: What the fake engine says to every row of a job; its own words otherwise.
_TEXTS = {"greedy": '{"a": [1, "\u00e9"]}'}

JOBS: dict[str, dict[str, Any]] = {
    "sampled": {
        "sampling": {"max_tokens": 9, "temperature": 1, "n": 2, "seed": 5, "logprobs": 2},
    },
    "greedy": {
        "sampling": {
            "max_tokens": 9,
            "logprobs": 0,
            "prompt_logprobs": True,
            "structured": {"json_schema": _SCHEMA},
        },
    },
}


def versions() -> dict[str, str]:
    return {"pyarrow": pa.__version__}


def finished_file(name: str) -> bytes:
    """Run the job of that name on the fake engine and return its only finished file.

    Rows are too long, empty, duplicates and results. A flush before the end of the input would
    lead to another layout of the same rows, so everything waits for the end.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):
        place = Place(folder)
        numbers = [*range(20), 3, 4]
        texts = [f"{n} " + "word " * (n * 7 % 45) for n in numbers] + [None, ""]
        frame = pl.DataFrame({"id": range(len(texts)), "text": texts, "kept": texts})
        place.write_parquet("in/a.parquet", frame)
        settings = job(
            place,
            name=name,
            input={"keep_columns": ["kept"]},
            prompt={"column": "text"},
            model=_MODEL,
            checkpoint={"every_rows": 10_000, "every_s": 3600.0},
            **JOBS[name],
        )
        plan = FakePlan(text=_TEXTS.get(name))
        clock = Clock(wall_ns=lambda: _WALL_NS, monotonic_ns=lambda: 0)
        host = Host(Counters(clock))
        with (
            mock.patch.object(encode, "_load", lambda path, **_: LightTokenizer(path)),
            mock.patch.dict(KINDS, fake_kinds(plan)),
            mock.patch("batchinfer.runner.flush._FIRST_FLUSH_S", 3600.0),
        ):
            parsed = load_job(str(write_job(Path(folder), settings)), []).job
            outcome = run_job(parsed, RunOptions(), host)
        assert outcome.status == "complete", outcome.message
        return Path(place.url("out", "a.parquet")).read_bytes()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for job_name in JOBS:
        (GOLDEN / f"{job_name}.parquet").write_bytes(finished_file(job_name))
    WRITTEN_BY.write_text(json.dumps(versions()) + "\n")
