"""Signals: what stops a run, what may not, and what every end says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchinfer.signals import STOP_CODES
from tests.support.jobs import (
    SLOW,
    Place,
    kill,
    results,
    run,
    start,
    wait,
    wait_until,
)


def test_a_signal_to_the_group_flushes_and_two_runs_add_up_to_the_rows(
    folder: Place, two_shards: Path
) -> None:
    process = start(two_shards, fake=SLOW)
    wait_until(folder.parts, what="a part")
    sent = time.monotonic()
    kill(process, signal.SIGTERM)
    stopped = wait(process, 20)
    assert time.monotonic() - sent < 20
    assert stopped.code == 143
    assert stopped.result["status"] == "stopped"
    assert 0 < stopped.result["rows_computed"] < 200
    rest = run(two_shards)
    assert rest.code == 0
    assert stopped.result["rows_computed"] + rest.result["rows_computed"] == 200
    assert results(folder)["attempt"].value_counts().sort("attempt")["count"].to_list() == [
        stopped.result["rows_computed"],
        rest.result["rows_computed"],
    ]


@pytest.mark.parametrize(("number", "code"), STOP_CODES.items())
def test_every_signal_that_asks_for_an_end_is_reported_with_its_code(
    folder: Place, two_shards: Path, number: signal.Signals, code: int
) -> None:
    process = start(two_shards, fake=SLOW)
    wait_until(folder.parts, what="a part")
    kill(process, number)
    stopped = wait(process, 20)
    assert stopped.code == stopped.result["exit_code"] == code
    assert stopped.result["status"] == "stopped"
    assert stopped.result["rows"] == stopped.result["rows_computed"] > 0
    assert f"received {number.name}: finished rows are durable" in stopped.result["message"]
    status = json.loads(Path(folder.url("out/_batchinfer/status/0001.json")).read_text())
    assert (status["state"], status["exit_code"]) == ("ended", code)


def test_a_signal_while_the_model_loads_ends_immediately_and_frees_the_lease(
    folder: Place, two_shards: Path
) -> None:
    process = start(two_shards, fake={"build_s": 60})
    wait_until(lambda: folder.names("out/_batchinfer/status"), what="the status file")
    sent = time.monotonic()
    kill(process, signal.SIGTERM)
    stopped = wait(process, 20)
    assert stopped.code == 143
    assert time.monotonic() - sent < 15
    assert run(two_shards).code == 0


def test_a_signal_during_imports_is_reported_like_any_other(two_shards: Path) -> None:
    process = start(two_shards, engine="real", is_fresh=True)

    def is_held() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        return bool(blocked >> (signal.SIGTERM - 1) & 1)

    wait_until(is_held, what="the import of the run's modules")
    kill(process, signal.SIGTERM)
    stopped = wait(process, 20)
    assert stopped.code == 143
    assert stopped.result["status"] == "stopped"
    assert "received SIGTERM before the first row was admitted" in stopped.result["message"]


def test_a_hanging_engine_is_ended_by_the_watchdog_and_finished_rows_are_kept(
    folder: Place, two_shards: Path
) -> None:
    process = start(two_shards, fake={**SLOW, "hang_at_step": 40}, environ={"FAKE_GRACE_S": "3"})
    wait_until(folder.parts, what="a part")
    time.sleep(2.5)
    sent = time.monotonic()
    kill(process, signal.SIGTERM)
    stopped = wait(process, 25)
    assert stopped.code == 143
    assert 2 < time.monotonic() - sent < 18
    rest = run(two_shards)
    assert rest.code == 0
    assert 0 < rest.result["rows_computed"] < 200


def test_a_second_signal_ends_the_process_immediately(folder: Place, two_shards: Path) -> None:
    process = start(two_shards, fake={**SLOW, "hang_at_step": 10})
    wait_until(lambda: folder.names("out/_batchinfer/status"), what="the status file")
    time.sleep(2)
    kill(process, signal.SIGTERM)
    time.sleep(0.3)
    kill(process, signal.SIGTERM)
    sent = time.monotonic()
    ended = wait(process, 10)
    assert time.monotonic() - sent < 8
    assert ended.code == ended.result["exit_code"] == 143
    assert ended.result["status"] == "stopped"
    assert "received SIGTERM, then SIGTERM: ended immediately" in ended.result["message"]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_two_signals_in_one_moment_are_one(folder: Place, two_shards: Path, first: int) -> None:
    """`timeout` sends two SIGTERM, systemd SIGTERM and SIGHUP."""
    process = start(two_shards, fake=SLOW)
    wait_until(folder.parts, what="a part")
    kill(process, first)
    kill(process, signal.SIGTERM)
    stopped = wait(process, 20)
    assert stopped.code in (129, 143)
    assert "finished rows are durable" in stopped.result["message"]


def test_the_kernels_reminders_of_a_cpu_limit_do_not_cut_the_flush(
    folder: Place, two_shards: Path
) -> None:
    process = start(two_shards, fake={**SLOW, "step_s": 2}, environ={"FAKE_GRACE_S": "8"})
    wait_until(lambda: folder.names("out/_batchinfer/status"), what="the status file")
    time.sleep(1)
    for _ in range(3):
        kill(process, signal.SIGXCPU)
        time.sleep(0.4)
    stopped = wait(process, 20)
    assert stopped.code == 152
    assert "ended immediately" not in stopped.result["message"]


def test_what_was_ignored_at_the_start_stays_ignored(folder: Place, two_shards: Path) -> None:
    process = start(two_shards, fake=SLOW, ignored=STOP_CODES)
    wait_until(folder.parts, what="a part")
    for number in STOP_CODES:
        kill(process, number)
    ended = wait(process, 60)
    assert (ended.code, ended.result["status"]) == (0, "complete"), ended.stderr


def test_a_run_that_was_suspended_continues(folder: Place, two_shards: Path) -> None:
    process = start(two_shards, fake=SLOW)
    wait_until(folder.parts, what="a part")
    kill(process, signal.SIGTSTP)
    time.sleep(1)
    assert process.poll() is None
    kill(process, signal.SIGCONT)
    assert wait(process, 60).code == 0


@pytest.mark.parametrize("max_seconds", ["1e10", "1e308"])
def test_a_limit_further_away_than_a_clock_can_say_hides_no_signal(
    folder: Place, two_shards: Path, max_seconds: str
) -> None:
    process = start(two_shards, "--set", f"limits.max_seconds={max_seconds}", fake=SLOW)
    wait_until(folder.parts, what="a part")
    kill(process, signal.SIGTERM)
    assert wait(process, 20).code == 143


def test_a_run_whose_watchdog_fails_ends() -> None:
    script = (
        "import select, time\n"
        "import os\n"
        "from batchinfer.cli.watchdog import Watchdog\n"
        "from batchinfer.runner import Stop\n"
        "stop = Stop()\n"
        "end = lambda code, reason: (print(reason, flush=True), os._exit(code))\n"
        "watchdog = Watchdog(stop, end=end, grace_s=0.2)\n"
        "watchdog.watch()\n"
        "stop.begin_admission()\n"
        "select.poll = None\n"
        "watchdog.set_max_seconds(1000)\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=50)
    assert ended.returncode == 1
    assert b"the watchdog failed" in ended.stdout


def test_a_run_whose_reader_is_gone_continues(folder: Place, two_shards: Path) -> None:
    """As after a kill -9 of a scheduler's runner, or the end of a terminal under nohup."""
    process = start(two_shards, fake=SLOW)
    wait_until(folder.parts, what="a part")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    assert "_SUCCESS" in folder.names("out")


def test_a_stop_that_was_asked_for_is_logged_as_no_error(folder: Place, two_shards: Path) -> None:
    process = start(two_shards, "--log-format", "json", fake=SLOW)
    wait_until(folder.parts, what="a part")
    kill(process, signal.SIGTERM)
    stopped = wait(process, 20)
    assert stopped.code == 143
    lines = [json.loads(line) for line in stopped.stderr.splitlines() if line.startswith("{")]
    levels = {line["level"] for line in lines if "received SIGTERM" in str(line)}
    assert levels == {"info"}
    assert not [text for text in stopped.result["warnings"] if "SIGTERM" in text]
