"""On a CUDA device (`make test-gpu`): the demo job, a resume after SIGTERM, memory settings."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.jobs import ROOT, Place, kill, results, run, start, wait, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.real_engine, pytest.mark.timeout(600)]

SUMMARIZE = ROOT / "jobs" / "summarize.yaml"


def test_the_demo_job_runs_on_the_gpu(folder: Place) -> None:
    output = f"output.path={folder.url('out')}"
    ended = run(SUMMARIZE, "--set", output, engine="real", timeout_s=300)
    assert ended.code == 0, ended.stderr
    assert results(folder).height == 1200
    name = folder.url("out", "prompts-00000-of-00004.parquet")
    facts = json.loads(pq.read_metadata(name).metadata[b"batchinfer"])
    assert facts["engine"]["device"] != "cpu"


def test_a_stopped_run_goes_on(folder: Place) -> None:
    arguments = ["--set", f"output.path={folder.url('out')}", "--set", "engine.max_num_seqs=8"]
    process = start(SUMMARIZE, *arguments, "--set", "checkpoint.every_s=0.2", engine="real")
    wait_until(
        lambda: any(n.endswith(".part") for n in folder.names("out")), timeout_s=300, what="a part"
    )
    kill(process, signal.SIGTERM)
    stopped = wait(process, 20)
    assert stopped.code == 143, stopped.stderr
    rest = run(SUMMARIZE, *arguments, engine="real", timeout_s=300)
    assert stopped.result["rows_computed"] + rest.result["rows_computed"] == 1200


@pytest.mark.parametrize(
    "setting", ["model.cpu_offload_gib=1", "model.save_mode=true", "model.kv_cache_dtype=fp8"]
)
def test_the_hosts_memory_and_a_smaller_cache_are_used(folder: Place, setting: str) -> None:
    more = ["--set", "model.save_mode_gib=1"] if "save_mode" in setting else []
    output = f"output.path={folder.url('out')}"
    arguments = ["--set", output, "--set", setting, *more, "--limit", "64"]
    ended = run(SUMMARIZE, *arguments, engine="real", timeout_s=300)
    assert ended.code == 0, ended.stderr
    log = (Path(folder.url("out")) / "_batchinfer/logs/0001.log").read_text()
    ready = next(line for line in log.splitlines() if "engine_ready" in line)
    assert "auto is" in log  # the share of the GPU's memory
    if "cpu_offload" in setting:
        found = re.search(r'device_bytes\\": (\d+)', ready)
        assert found is not None and int(found[1]) < 13_900_288 / 2
    if "kv_cache_dtype" in setting:
        assert 'kv_cache_dtype\\": \\"fp8' in ready
