"""What a run costs: by the clock and its price, and by the meters of the devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.config import load_job
from batchinfer.engine.kinds import KINDS
from batchinfer.runner import Host, RunOptions, run_job
from batchinfer.runner.spent import Spent
from batchinfer.telemetry import Clock, Counters, describe
from batchinfer.testing import FakePlan
from tests.support.fake_run import fake_kinds
from tests.support.in_process import LightTokenizer

#: A driver's library with two devices: one that has a meter, and one that has none (a MIG slice).
_DRIVER = """
typedef struct { int index; } device;
static device devices[2] = {{0}, {1}};
static unsigned long long used = 1000000;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **handle) {
  *handle = &devices[index];
  return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(device *handle, unsigned long long *millijoules) {
  if (handle->index == 1) return 3;
  *millijoules = used += 2500000;
  return 0;
}
"""
_METERED = """
import json
from batchinfer.runner.spent import Spent
spent = Spent(None)
spent.read(range({num_devices}))
print(json.dumps(spent.as_dict(60.0, 5000, "completion tokens")))
"""


def test_a_price_makes_a_cost_in_all_and_for_a_thousand_tokens() -> None:
    found = Spent(7.2).as_dict(500.0, 20_000, "completion tokens")
    assert found == {
        "cost": 1.0,
        "cost_per_1000_tokens": 0.05,
        "text": "cost 1.00 at 7.2 an hour, 0.05 for 1,000 completion tokens "
        "(all of it attributed to them)",
    }


def test_before_the_first_token_there_is_a_cost_of_none() -> None:
    found = Spent(3600.0).as_dict(2.0, 0, "completion tokens")
    assert found is not None
    assert (found["cost"], found["cost_per_1000_tokens"]) == (2.0, None)


def test_without_a_price_and_a_meter_nothing_is_said() -> None:
    spent = Spent(None)
    spent.read([0])
    assert spent.as_dict(500.0, 20_000, "completion tokens") is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("visible", "num_devices", "joules"),
    [("0,1", 1, 2500.0), ("0,1", 2, None), ("1", 1, None), ("", 1, None)],
)
def test_energy_is_what_the_drivers_meters_say_of_the_devices_in_use(
    visible: str, num_devices: int, joules: float | None, tmp_path: Path
) -> None:
    (tmp_path / "driver.c").write_text(_DRIVER)
    library = tmp_path / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", _METERED.format(num_devices=num_devices)],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    if joules is None:
        assert found is None
    else:
        assert (found["joules"], found["joules_per_1000_tokens"]) == (joules, joules / 5)
        assert "2,500 J of the device, 500.00 J for 1,000 completion tokens" in found["text"]


def test_a_run_reports_its_cost_at_its_end_and_in_its_status(
    two_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchinfer.prompt.encode._load", lambda path, **_: LightTokenizer(path))
    for name, kind in fake_kinds(FakePlan(step_s=0.002)).items():
        monkeypatch.setitem(KINDS, name, kind)
    job = load_job(str(two_shards), ["limits.price_per_hour=3600"]).job
    host = Host(Counters(Clock()))
    outcome = run_job(job, RunOptions(), host)
    line = outcome.as_dict()
    tokens = line["completion_tokens"]
    assert line["spent"]["cost"] > 0
    per_thousand = 1000 * line["spent"]["cost"] / tokens
    assert line["spent"]["cost_per_1000_tokens"] == pytest.approx(per_thousand, rel=1e-3)
    assert "joules" not in line["spent"]
    assert line["verdict"]["bound"] in ("unknown", "tail", "host", "input", "step overhead")
    assert line["verdict"]["share_of_roof"] is None, "nobody knows what the fake can do"
    record = {
        **{"run": 1, "slice": "all", "state": "ended", "exit_code": 0, "updated_at": "now"},
        **{"rows_done_at_start": 0, "rows_durable": 200, "rows_total": 200, "rows_failed": 0},
        **{"verdict": line["verdict"], "spent": line["spent"]},
    }
    told = describe(record, 0.0, is_dead_here=None).splitlines()
    assert told[1:] == [f"  {line['verdict']['text']}", f"  {line['spent']['text']}"]
