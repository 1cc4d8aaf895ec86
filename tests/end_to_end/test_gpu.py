"""On a CUDA device (`make test-gpu`): the demo job, a resume after SIGTERM, memory."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.jobs import ROOT, Ended, Place, kill, results, run, start, wait, wait_until

pytestmark = [pytest.mark.gpu, pytest.mark.real_engine, pytest.mark.timeout(600)]

log = logging.getLogger(__name__)

SUMMARIZE = ROOT / "jobs" / "summarize.yaml"


def test_the_demo_job_runs_on_the_gpu(folder: Place) -> None:
    output = f"output.path={folder.url('out')}"
    ended = run(SUMMARIZE, "--set", output, engine="real", timeout_s=300)
    assert ended.code == 0, ended.stderr
    assert results(folder).height == 1200
    name = folder.url("out", "prompts-00000-of-00004.parquet")
    facts = json.loads(pq.read_metadata(name).metadata[b"batchinfer"])
    assert facts["engine"]["device"] != "cpu"


def test_a_stopped_run_continues(folder: Place) -> None:
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
    more = ["model.save_mode_gib=1"] if "save_mode" in setting else []
    ended = summarize(folder, "out", setting, *more)
    assert ended.code == 0, ended.stderr
    text = (Path(folder.url("out")) / "_batchinfer/logs/0001.log").read_text()
    ready = next(line for line in text.splitlines() if "engine_ready" in line)
    assert "auto is" in text  # the share of the GPU's memory
    if "cpu_offload" in setting:
        found = re.search(r'device_bytes\\": (\d+)', ready)
        assert found is not None and int(found[1]) < 13_900_288 / 2
    if "kv_cache_dtype" in setting:
        assert 'kv_cache_dtype\\": \\"fp8' in ready


HOLD = """
import sys, torch
num_bytes = int(float(sys.argv[1]) * torch.cuda.mem_get_info()[1])
held = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def crowded() -> Iterator[None]:
    """Another process holds six tenths of the GPU's memory."""
    command = [sys.executable, "-c", HOLD, "0.6"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


@pytest.mark.usefixtures("crowded")
def test_a_run_takes_what_other_processes_leave_of_the_gpu(folder: Place) -> None:
    ended = summarize(folder, "out")
    assert ended.code == 0, ended.stderr
    text = (Path(folder.url("out")) / "_batchinfer/logs/0001.log").read_text()
    found = re.search(r"gpu_memory_utilization auto is (0\.\d+): other processes hold", text)
    assert found is not None and 0.3 < float(found[1]) < 0.4
    refused = summarize(folder, "refused", "engine.gpu_memory_utilization=0.8")
    assert refused.code == 75, refused.stderr  # it passes when the other process ends
    assert re.search(r"(process \d+ .*holds|hold) \d+\.\d GiB", refused.result["message"])
    assert "auto would take what others leave" in refused.result["message"]


@pytest.mark.parametrize(
    ("short", "key"),
    [
        ("engine.gpu_memory_utilization=0.001", "engine.gpu_memory_utilization"),
        ("engine.options.kv_cache_memory_bytes=2000000", "engine.options.kv_cache_memory_bytes"),
        ("engine.options.kv_cache_memory_bytes=2000000", "model.max_model_len"),
    ],
)
def test_what_is_said_to_fit_where_memory_is_short_fits(
    folder: Place, short: str, key: str
) -> None:
    refused = summarize(folder, "refused", short)
    assert refused.code == 2, refused.stderr
    log.info("%s", refused.result["message"])
    found = re.search(rf"What would fit: .*?{re.escape(key)} ([\d.]+)", refused.result["message"])
    assert found is not None
    again = summarize(folder, "again", short, f"{key}={found[1]}")
    assert again.code == 0, again.stderr


def summarize(folder: Place, output: str, *settings: str) -> Ended:
    """64 rows of the demo job."""
    eager = "engine.options.enforce_eager=true"  # no minute of compiling
    changes = [f"output.path={folder.url(output)}", eager, *settings]
    arguments = [part for change in changes for part in ("--set", change)]
    return run(SUMMARIZE, "--limit", "64", *arguments, engine="real", timeout_s=300)
