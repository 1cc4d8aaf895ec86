"""What people, schedulers and machines see of a run."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from batchinfer.config import Job, SamplingSettings
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.plan import Chunk, WorkItem
from batchinfer.runner.loop import Loop
from batchinfer.telemetry import (
    Clock,
    Counters,
    Logs,
    Progress,
    choose_display,
    describe,
    log_event,
    status_record,
    utc_seconds,
    utc_text,
)
from batchinfer.telemetry.progress import live_line
from batchinfer.testing import FakeEngine, FakePlan
from tests.support.jobs import Place
from tests.support.jobs import job as job_settings

HOLDER = {"host": "node-7", "pid": 4242, "boot_id": "b", "process_start": "1", "since": "x"}


class Hands:
    """The two clocks of a machine, turned by hand."""

    def __init__(self) -> None:
        self.wall_ns = 1_800_000_000 * 10**9
        self.monotonic_ns = 5 * 10**9
        self.clock = Clock(lambda: self.wall_ns, lambda: self.monotonic_ns)

    def pass_s(self, seconds: float) -> None:
        self.monotonic_ns += int(seconds * 1e9)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def logger() -> logging.Logger:
    return logging.getLogger("batchinfer.test")


def test_a_wall_clock_set_back_does_not_move_timestamps_back(hands: Hands) -> None:
    before = hands.clock.wall_us()
    hands.wall_ns -= 3600 * 10**9
    hands.pass_s(1.5)
    assert hands.clock.wall_us() - before == 1_500_000
    assert hands.clock.utc() == "2027-01-15T08:00:01.500Z"


def test_a_time_survives_its_text() -> None:
    assert utc_seconds(utc_text(1_800_000_000.25)) == 1_800_000_000.25


def test_the_recent_rate_forgets_what_is_older_than_its_window(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_in_flight(64)
    for _ in range(100):  # 100 s at 1000 tokens/s
        hands.pass_s(1)
        counters.add_computed(10, 50, 1000)
    for _ in range(60):  # 60 s at 100 tokens/s
        hands.pass_s(1)
        counters.add_computed(1, 5, 100)
    snapshot = counters.snapshot()
    assert snapshot.tokens_per_s == pytest.approx(100, rel=0.05)
    assert snapshot.mean_tokens_per_s == pytest.approx(106_000 / 160)
    assert snapshot.generation_s == pytest.approx(160)


def test_the_rate_of_many_small_steps_keeps_few_samples(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_in_flight(1)
    for _ in range(10_000):
        hands.pass_s(0.01)
        counters.add_computed(1, 1, 10)
    assert counters.snapshot().tokens_per_s == pytest.approx(1000, rel=0.05)
    assert len(counters._samples) < 100


def test_only_steps_while_rows_remain_count_as_underfilled(hands: Hands) -> None:
    counters = Counters(hands.clock)
    for num_running in (64, 50, 40, 10):
        counters.add_step(num_running)
    counters.add_steps_with_more(3, 1)  # the last one was the end
    snapshot = counters.snapshot()
    assert snapshot.share_of_steps_underfilled == pytest.approx(1 / 3)
    assert (snapshot.num_steps, snapshot.mean_num_running) == (4, 41)


class Trickle:
    """Work that comes a few items at a time, as from a reader that is behind."""

    planned_s = 0.0

    def __init__(self, num_rows: int, at_once: int) -> None:
        chunk = Chunk(
            shard="a.parquet",
            window=0,
            rows=np.arange(num_rows),
            token_ids=np.arange(num_rows, dtype=np.int32),
            offsets=np.arange(num_rows + 1),
            carried=pa.table({"id": pa.array(range(num_rows))}),
            errors={},
            is_todo=np.ones((num_rows, 1), dtype=np.bool_),
        )
        self._items = [WorkItem(chunk, index, 0) for index in range(num_rows)]
        self._at_once = self._left = at_once

    def take(self) -> WorkItem | None:
        if self._left and self._items:
            self._left -= 1
            return self._items.pop()
        self._left = self._at_once
        return None

    @property
    def is_exhausted(self) -> bool:
        return not self._items


@pytest.mark.parametrize(("at_once", "share"), [(100, 0), (7, 1)])
def test_an_engine_that_could_run_more_than_its_reader_brings_is_underfilled(
    at_once: int, share: float
) -> None:
    counters = Counters(Clock())
    engine = FakeEngine(
        FakePlan(max_num_seqs=8),
        CompletionDemand("generate", SamplingSettings(max_tokens=1)),
        max_model_len=64,
    )
    job = Job.model_validate(job_settings(Place("nowhere")))
    loop = Loop(
        engine,
        Trickle(70, at_once),  # type: ignore[arg-type]
        lambda results: None,
        counters,
        job=job,
        should_stop=lambda: False,
    )
    steps = [counters.snapshot().num_steps for _ in loop.steps()]
    snapshot = counters.snapshot()
    assert snapshot.share_of_steps_underfilled == share
    assert snapshot.mean_num_running == pytest.approx(70 / snapshot.num_steps)
    assert steps == list(range(1, snapshot.num_steps + 1)), "each step is told when it is over"


def test_start_up_is_timed_from_the_start_of_the_process() -> None:
    script = (
        "import time; time.sleep(0.3)\n"
        "from batchinfer.telemetry import StartUp\n"
        "startup = StartUp()\n"
        "with startup.span('model'): time.sleep(0.1)\n"
        "startup.end()\n"
        "import json; print(json.dumps(startup.as_dict()))\n"
    )
    begun = time.monotonic()
    told = json.loads(subprocess.check_output([sys.executable, "-c", script], text=True))
    took_s = time.monotonic() - begun
    (imports_begin_s, imports_end_s), (model_begin_s, model_end_s) = told["imports"], told["model"]
    assert imports_begin_s == 0 and 0.29 < imports_end_s <= model_begin_s
    assert model_end_s - model_begin_s > 0.09
    assert model_end_s <= told["total_s"] < took_s + 0.02  # the kernel counts in ticks of 10 ms


def test_the_eta_counts_tokens_of_rows_that_are_left(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_total(1000, 2)
    counters.add_read(1000, 200)
    counters.set_in_flight(8)
    hands.pass_s(10)
    counters.add_computed(100, 5000, 2000)  # 20 tokens a row, 200 tokens/s; 700 rows left
    snapshot = counters.snapshot()
    assert snapshot.eta_s == pytest.approx(700 * 20 / 200)
    assert snapshot.rows_done == 200  # computed is not durable yet


def test_there_is_no_eta_while_the_first_wave_is_in_flight(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_total(1000, 1)
    counters.add_read(1000, 0)
    counters.set_in_flight(256)
    hands.pass_s(10)
    counters.add_computed(2, 100, 40)
    assert counters.snapshot().eta_s is None
    counters.add_computed(254, 100, 4000)
    assert counters.snapshot().eta_s is not None


def test_tokens_of_unfinished_rows_count_from_the_first_steps_on(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_in_flight(8)
    for second in range(1, 5):
        hands.pass_s(1)
        counters.set_tokens_in_flight(80 * second)
    assert counters.snapshot().tokens_per_s == pytest.approx(80)
    counters.add_computed(2, 10, 80)  # of the 320; counted once
    assert counters.snapshot().tokens_per_s == pytest.approx(80)


def test_the_first_eta_does_not_take_the_first_rows_for_the_mean(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_max_tokens(100)
    counters.set_total(1000, 1)
    counters.add_read(1000, 0)
    counters.set_in_flight(256)
    hands.pass_s(10)
    counters.add_computed(8, 100, 8)  # the shortest, of one token
    counters.set_tokens_in_flight(248 * 2)
    assert counters.snapshot().eta_s == pytest.approx((992 * 504 / 8 - 496) / 50.4)
    counters.set_tokens_in_flight(248 * 50)
    remaining = 992 * 100 - 248 * 50  # a row never has more than max_tokens
    snapshot = counters.snapshot()
    assert snapshot.eta_s == pytest.approx(remaining / snapshot.tokens_per_s)


def test_rows_that_all_last_to_the_end_have_an_eta_half_way(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_max_tokens(100)
    counters.set_total(64, 1)
    counters.add_read(64, 0)
    counters.set_in_flight(64)
    hands.pass_s(10)
    counters.set_tokens_in_flight(64 * 40)
    assert counters.snapshot().eta_s is None
    hands.pass_s(5)
    counters.set_tokens_in_flight(64 * 60)
    assert counters.snapshot().eta_s == pytest.approx(64 * 40 / (64 * 60 / 15))


def test_what_an_engine_does_while_it_loads_is_told() -> None:
    from batchinfer.engine.vllm.phases import reported_phases

    told: list[str] = []
    logger = logging.getLogger("vllm.v1.worker.some")
    logger.setLevel(logging.INFO)
    with reported_phases(told.append):
        logger.info("Starting to load model %s...", "m")
        logger.info("Unrelated %d", 1)
        logger.info("Dynamo bytecode transform time: %.2f s", 3.0)
    logger.info("Starting to load model %s...", "m")
    assert told == ["loading the weights", "compiling the model"]


def test_the_total_follows_the_share_that_passes_the_filter(hands: Hands) -> None:
    counters = Counters(hands.clock)
    counters.set_total(1000, 1)
    assert counters.snapshot().rows_total == 1000
    counters.add_read(100, 0, 25)
    assert counters.snapshot().rows_total == 250
    counters.add_read(900, 0, 900)
    assert counters.snapshot().rows_total == 925


def test_rows_refused_before_the_engine_do_not_count_as_generation(hands: Hands) -> None:
    counters = Counters(hands.clock)
    hands.pass_s(100)
    counters.add_computed(5, 0, 0)
    snapshot = counters.snapshot()
    assert (snapshot.generation_s, snapshot.tokens_per_s, snapshot.eta_s) == (0.0, 0.0, None)


def test_no_addition_of_any_thread_is_lost(hands: Hands) -> None:
    counters = Counters(hands.clock)

    def add() -> None:
        for _ in range(2000):
            counters.add_computed(1, 2, 3)
            counters.add_durable(1, 0)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = counters.snapshot()
    assert (snapshot.rows_computed, snapshot.rows_durable) == (8000, 8000)
    assert (snapshot.prompt_tokens, snapshot.result_tokens) == (16000, 24000)


@pytest.fixture
def logs_of() -> Iterator[list[Logs]]:
    opened: list[Logs] = []
    yield opened
    for logs in opened:
        logs.close()


def test_people_read_quoted_values_and_whole_lines(
    logs_of: list[Logs], logger: logging.Logger
) -> None:
    err = io.StringIO()
    logs_of.append(Logs(err))
    log_event(logger, logging.WARNING, "shard_finished", shard="a b.parquet", rows=5, seconds=0.25)
    logger.info("two\nlines %d", 7)
    first, *second = err.getvalue().splitlines()
    assert first.endswith('Z warning shard_finished shard="a b.parquet" rows=5 seconds=0.25')
    assert [second[0].split("Z ")[1], *second[1:]] == ["two", "  lines 7"]


def test_details_that_are_mappings_are_left_to_the_file(
    logs_of: list[Logs], logger: logging.Logger, tmp_path: Path
) -> None:
    err = io.StringIO()
    logs = Logs(err)
    logs_of.append(logs)
    logs.open_file(tmp_path / "0001.log", run=1)
    log_event(logger, logging.INFO, "engine_ready", device="cpu", extra={"eager": True})
    logger.info("two\nlines")
    assert err.getvalue().splitlines()[0].endswith("Z engine_ready device=cpu")
    ready, lines = (tmp_path / "0001.log").read_text().splitlines()
    assert ready.endswith('engine_ready device=cpu extra="{\\"eager\\": true}"')
    assert lines.endswith("two lines")


def test_machines_read_json_with_the_fields_and_the_run(
    logs_of: list[Logs], logger: logging.Logger, tmp_path: Path
) -> None:
    err = io.StringIO()
    logs = Logs(err, json_lines=True)
    logs_of.append(logs)
    logs.open_file(tmp_path / "0003.log", run=3)
    log_event(logger, logging.INFO, "part_published", rows=512, level="not the level")
    (line,) = err.getvalue().splitlines()
    record = json.loads(line)
    assert utc_seconds(record.pop("time")) == pytest.approx(time.time(), abs=60)
    assert record == {"level": "info", "event": "part_published", "run": 3, "rows": 512}


LOGS_PROGRAM = """
import logging, sys
from pathlib import Path
from batchinfer.telemetry import Logs
logs = Logs(sys.stdout, level=logging.ERROR)
ours = logging.getLogger("batchinfer.test")
logging.getLogger("vllm.early").warning("before the file is there")
logs.open_file(Path(sys.argv[1]), run=1)
logging.getLogger("vllm.engine").warning("from the engine")
ours.info("from us")
ours.error("for everybody")
"""


def test_loggers_of_libraries_reach_the_file_and_never_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "0001.log"
    done = subprocess.run(  # pytest's own handlers would hide what the root logger prints
        [sys.executable, "-c", LOGS_PROGRAM, str(log)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert [line.split("Z ")[1] for line in done.stdout.splitlines()] == ["error for everybody"]
    assert [line.split("Z ")[1] for line in log.read_text().splitlines()] == [
        "vllm.engine warning from the engine",
        "batchinfer.test from us",
        "batchinfer.test error for everybody",
    ]


def test_closed_logs_leave_the_loggers_as_they_were(tmp_path: Path) -> None:
    root, ours = logging.getLogger(), logging.getLogger("batchinfer")
    before = [(x.level, x.propagate, list(x.handlers)) for x in (root, ours)]
    logs = Logs(io.StringIO())
    logs.open_file(tmp_path / "0001.log", run=1)
    logs.close()
    assert [(x.level, x.propagate, list(x.handlers)) for x in (root, ours)] == before


@pytest.mark.parametrize(
    ("stream", "environ", "quiet", "json_lines", "display"),
    [
        (Terminal(), {"TERM": "xterm"}, False, False, "live"),
        (Terminal(), {"TERM": "xterm", "CI": "true"}, False, False, "plain"),
        (Terminal(), {"TERM": "dumb"}, False, False, "plain"),
        (Terminal(), {"TERM": "xterm"}, False, True, "plain"),
        (Terminal(), {"TERM": "xterm"}, True, False, "none"),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False, False, "plain"),
    ],
)
def test_the_display_is_live_only_where_a_person_looks(
    stream: io.StringIO, environ: dict[str, str], quiet: bool, json_lines: bool, display: str
) -> None:
    assert choose_display(stream, environ, quiet=quiet, json_lines=json_lines) == display


def _counters_at_work(hands: Hands) -> Counters:
    counters = Counters(hands.clock)
    counters.set_phase("generating")
    counters.set_total(1000, 4)
    counters.add_read(1000, 0)
    counters.set_in_flight(8)
    counters.add_step(8)
    hands.pass_s(10)
    counters.add_computed(250, 1000, 5000)
    counters.add_durable(240, 3)
    return counters


def test_plain_progress_is_log_lines_without_escapes(
    hands: Hands,
    logs_of: list[Logs],
    logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    err = io.StringIO()
    logs = Logs(err)
    logs_of.append(logs)
    counters = _counters_at_work(hands)
    with Progress("plain", counters.snapshot, logger, logs.terminal, plain_period_s=0.02):
        _wait_until(lambda: err.getvalue().count("\n") >= 2)
    assert "\x1b" not in err.getvalue() and "\r" not in err.getvalue()
    assert (
        err.getvalue()
        .splitlines()[0]
        .endswith(
            "progress phase=generating rows_done=240 rows_total=1000 rows_failed=3 "
            "tokens_per_s=500.0 eta_s=30 rows_in_flight=8 rows_finished=250"
        )
    )


def test_a_live_line_redraws_and_logs_stand_above_it(
    hands: Hands, logs_of: list[Logs], logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    err = Terminal()
    logs = Logs(err)
    logs_of.append(logs)
    counters = _counters_at_work(hands)
    with Progress("live", counters.snapshot, logger, logs.terminal):
        _wait_until(lambda: "240/1,000 rows (24%)" in err.getvalue())
        logger.warning("something [bold]happened[/bold]")
        counters.add_durable(10, 0)
        _wait_until(lambda: "250/1,000" in err.getvalue())
    text = err.getvalue()
    assert "3 failed  500 tokens/s  ETA about 0:00:30  8 in flight" in text
    erase_line = re.escape("\r\x1b[2K")
    assert re.search(erase_line + r"[^\r]*warning something \[bold\]happened\[/bold\]\n", text)
    assert logs.terminal.stream is err


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        (120, 6),
        (100, 5),
        (80, 3),
        (60, 2),
        (30, 0),
    ],
)
def test_a_live_line_leaves_out_whole_facts_the_last_first(
    columns: int, facts: int, hands: Hands
) -> None:
    console = Console(width=columns, file=io.StringIO(), force_terminal=False)
    with console.capture() as shown:
        console.print(live_line(_counters_at_work(hands).snapshot()))
    line = shown.get().rstrip()
    assert "\n" not in line and len(line) <= columns
    all_facts = [
        *("240/1,000 rows (24%)", "3 failed", "500 tokens/s", "ETA about 0:00:30"),
        *("8 in flight", "10 not yet durable"),
    ]
    assert facts == sum(fact in line for fact in all_facts), line
    if facts:
        assert line.endswith("  ".join(all_facts[:facts])), line


def test_no_display_starts_no_thread(hands: Hands, logger: logging.Logger) -> None:
    before = threading.active_count()
    with Progress(
        "none", Counters(hands.clock).snapshot, logger, logging.StreamHandler(io.StringIO())
    ):
        assert threading.active_count() == before


def _record(hands: Hands, **changes: object) -> dict[str, object]:
    record = status_record(
        _counters_at_work(hands),
        run=2,
        slice_name="all",
        holder=HOLDER,
        in_flight=[f"a.parquet:{row}" for row in range(5000)],
        startup={"total_s": 8.5, "imports": [0.0, 0.7]},
    )
    return record | changes


def test_a_status_record_is_json_and_names_a_bounded_number_of_rows(hands: Hands) -> None:
    record = json.loads(json.dumps(_record(hands), allow_nan=False))
    assert (record["state"], record["rows_durable"], record["run"]) == ("running", 240, 2)
    assert len(record["in_flight"]) == 2048


@pytest.mark.parametrize(
    ("age_s", "is_dead_here", "text"),
    [
        (3, None, "running: generating (host node-7, pid 4242, updated 3 s ago), 240 of 1,000"),
        (3, True, "died in phase 'generating' (host node-7, pid 4242 is gone), 240 of 1,000"),
        (90, None, "probably died in phase 'generating' (host node-7, pid 4242; no sign of life"),
        (90, False, "running: generating"),
        (-40, None, "updated 0 s ago"),  # the writer's clock is ahead of ours
    ],
)
def test_a_run_is_described_by_what_can_be_known_of_it(
    hands: Hands, age_s: float, is_dead_here: bool | None, text: str
) -> None:
    record = _record(hands)
    now_s = hands.clock.wall() + age_s
    described = describe(record, now_s, is_dead_here=is_dead_here)
    assert text in described
    assert "\n" not in described


def test_an_ended_run_is_described_by_its_exit_code(hands: Hands) -> None:
    record = _record(hands, state="ended", exit_code=75, slice="3/8")
    described = describe(record, hands.clock.wall() + 9999, is_dead_here=True)
    assert described.startswith(
        "run 2 (slice 3/8) ended 2027-01-15T08:00:10.000Z with exit code 75"
    )
    assert "ETA" not in described


STDIO_PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from batchinfer.telemetry import Stdio
stdio = Stdio()
stdio.redirect(Path(sys.argv[1]))
print("python prints")
print("python errs", file=sys.stderr)
sys.stdout.flush()
subprocess.run(["sh", "-c", "echo child prints; echo child errs >&2"])
os.write(1, b"c prints\\n")
for _ in range(3):
    print("for people", file=stdio.err)
is_written = stdio.write_result('{"status": "done"}') is None
Path(sys.argv[1] + ".survived").write_text(str(is_written))
"""


def _run_stdio(log: Path, shell: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "$2" {shell}', sys.executable, STDIO_PROGRAM, str(log)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_everything_printed_goes_to_the_log_but_ours(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = _run_stdio(log, "")
    assert done.stdout == '{"status": "done"}\n'
    assert done.stderr == "for people\n" * 3
    assert set(log.read_text().splitlines()) == {
        "python prints",
        "python errs",
        "child prints",
        "child errs",
        "c prints",
    }


@pytest.mark.parametrize(
    ("shell", "is_written"),
    [
        (">&- 2>&-", "True"),  # closed at start: /dev/null took their place
        ("<&- >&- 2>&-", "True"),
        (">/dev/full 2>/dev/full", "False"),
    ],
)
def test_streams_that_nobody_can_read_stop_nothing(
    tmp_path: Path, shell: str, is_written: str
) -> None:
    log = tmp_path / "run.log"
    done = _run_stdio(log, shell)
    assert (tmp_path / "run.log.survived").read_text() == is_written
    assert "c prints" in log.read_text()
    assert "Traceback" not in done.stderr + log.read_text()


def test_a_pipe_that_broke_stops_nothing(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run(
        [sys.executable, "-c", STDIO_PROGRAM, str(log)],
        stdout=writer,
        stderr=writer,
        check=True,
        timeout=60,
    )
    os.close(writer)
    assert (tmp_path / "run.log.survived").read_text() == "False"
    assert "c prints" in log.read_text()


def test_a_terminal_is_still_known_as_one_after_the_redirect(tmp_path: Path) -> None:
    parent, child = pty.openpty()
    program = (
        "import sys, pathlib; from batchinfer.telemetry import Stdio; s = Stdio(); "
        "s.redirect(pathlib.Path(sys.argv[1])); s.write_result(str(s.err.isatty()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        stderr=child,
        timeout=60,
        check=True,
    )
    os.close(child)
    os.close(parent)
    assert done.stdout == b"True\n"


def _wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)
