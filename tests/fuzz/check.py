"""Runs a case and says which promise of the command line is broken.

Promises: an exit code of its class and never 1, no traceback, no hang; `validate` refuses what
`run` refuses and nothing else; every row that passes the filter has exactly n results with its own
id and kept values; files of an output have one schema; an interrupted run that is started again
has the results of an uninterrupted one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchinfer.config import Job, load_job
from batchinfer.errors import ConfigError
from tests.fuzz.case import INPUT, JOB, Plan
from tests.fuzz.results import check_output, stable_results
from tests.fuzz.server import Ended, Server
from tests.fuzz.wrong import Broken

_DONE = (0, 3)
_STATUSES = ("complete", "partial", "stopped", "failed")
_CRASHED = re.compile(
    r"Traceback|internal error|bug in batchinfer|Exception in thread|Exception ignored|Fatal Python"
    r"|panicked at"
)
#: What `run` may refuse although `validate` did not: only reading the values tells, or writing.
_ONLY_TRIED = re.compile(
    r"input\.filter .* failed: |has other values than its folder|cannot (create|write) "
)
_OTHER_OUTPUT = "again"


def check(folder: Path, plan: Plan, server: Server) -> Counter[str]:
    """Raises Broken. Returns how often which command ended with which code."""
    return _Check(folder, plan, server).run()


class _Check:
    def __init__(self, folder: Path, plan: Plan, server: Server) -> None:
        self._folder = folder
        self._plan = plan
        self._server = server
        self._codes: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        validated = self._command("validate", JOB)
        self._expect(validated, (0, 2))
        ran = self._command("run", JOB)
        self._check_last_line(ran)
        job = self._job()
        allowed = {0, 2, 3} | ({75} if job and job.limits.max_seconds else set())
        self._expect(ran, sorted(allowed))
        self._compare(validated, ran)
        if self._plan.is_repeated:
            again = self._command("validate", JOB)
            if ran.code == 2 and (again.code, again.stderr) != (validated.code, validated.stderr):
                raise Broken("validate differs the second time", again)
            if (repeated := self._command("run", JOB)).code != ran.code:
                raise Broken("run differs the second time", repeated)
        if job is not None and ran.code in _DONE:
            self._check_done(job, ran)
        for look in self._plan.looks:
            self._expect(self._command(*look), (0, 2))
        if job is not None and ran.code in _DONE and (self._plan.interrupted or self._plan.sets):
            self._check_interrupted(job, ran)
        return self._codes

    def _command(self, *argv: str, **options: Any) -> Ended:
        ended = self._server.run(argv, self._folder, **options)
        self._codes[f"{argv[0]} {ended.code}"] += 1
        if ended.is_hung:
            raise Broken("hangs", ended)
        if found := _CRASHED.search(ended.stdout + ended.stderr):
            raise Broken(found[0], ended)
        return ended

    def _expect(self, ended: Ended, codes: Sequence[int]) -> None:
        if ended.code not in codes:
            raise Broken(f"{ended.argv[0]} ends with {ended.code}", ended)
        if ended.code not in _DONE and not ended.stderr.strip():
            raise Broken(f"{ended.argv[0]} says nothing", ended)

    def _check_last_line(self, ran: Ended) -> None:
        lines = ran.stdout.splitlines()
        try:
            line = json.loads(lines[-1]) if lines else None
        except ValueError:
            line = None
        if len(lines) != 1 or not isinstance(line, dict):
            raise Broken("run's stdout is not one line of JSON", ran)
        if line["exit_code"] != ran.code or line["status"] not in _STATUSES:
            raise Broken("the JSON line says another code", ran)
        if ran.code not in (0,) and not line["message"]:
            raise Broken("the JSON line has no message", ran)

    def _job(self) -> Job | None:
        try:
            return load_job(self._folder / JOB, environ={}).job
        except ConfigError:
            return None

    def _output(self, job: Job) -> Path:
        """Commands run in the folder, and have it as their home."""
        path = job.output.path
        return self._folder / (path[1:].lstrip("/") if path.startswith("~") else path)

    def _compare(self, validated: Ended, ran: Ended) -> None:
        if validated.code == 2 and ran.code != 2:
            raise Broken("validate refuses what run takes", validated)
        if validated.code == 0 and ran.code == 2 and not _ONLY_TRIED.search(ran.stderr):
            raise Broken("run refuses what validate takes", ran)

    def _check_done(self, job: Job, ran: Ended) -> None:
        line = json.loads(ran.stdout)
        if line["status"] != "complete":
            raise Broken("complete, but the status is another", ran)
        totals = check_output(self._folder, job, self._output(job), ran)
        if line["rows"] != totals.rows or line["rows_failed"] != totals.failed:
            raise Broken("the JSON line counts other rows than there are", ran)
        share = totals.failed / max(1, totals.rows)
        if (ran.code == 3) != (share > job.limits.max_failed_fraction):
            raise Broken("max_failed_fraction is not obeyed", ran)
        text = "\n".join(
            path.read_text() for path in (self._output(job)).rglob("_batchinfer/logs/*")
        )
        if found := _CRASHED.search(text):
            raise Broken(f"the log has: {found[0]}", ran, text[-3000:])

    def _check_interrupted(self, job: Job, ran: Ended) -> None:
        output = f"output.path={_OTHER_OUTPUT}"
        sets = [f"--set={setting}" for setting in (output, *self._plan.sets)]
        if self._plan.is_grown:
            is_refused = self._grow(sets)
        else:
            is_refused = False
            self._interrupt(sets)
        if not is_refused:
            self._finish(job, ran, sets)

    def _interrupt(self, sets: list[str]) -> None:
        for start in self._plan.interrupted:
            ended = self._command(
                "run",
                JOB,
                *sets,
                *start.options,
                crash=start.crash,
                signal_after_s=start.signal_after_s,
            )
            by_signal = {-9} if start.crash else {-15, 143} if start.signal_after_s else set()
            if ended.code not in {0, 3} | by_signal:
                raise Broken(f"an interrupted run ends with {ended.code}", ended)

    def _grow(self, sets: list[str]) -> bool:
        """A start without the last shard. The types of an output are those of its first input:
        returns whether the rest does not fit them.
        """
        late = self._folder / "late.parquet"
        shard = max((self._folder / INPUT).rglob("*.parquet"))
        shard.rename(late)
        self._expect(self._command("run", JOB, *sets), (0, 2, 3))
        late.rename(shard)
        validated = self._command("validate", JOB, *sets)
        self._expect(validated, (0, 2))
        if validated.code == 2:
            self._expect(self._command("run", JOB, *sets), (2,))
        return validated.code == 2

    def _finish(self, job: Job, ran: Ended, sets: list[str]) -> None:
        self._expect(self._command("validate", JOB, *sets), (0,))
        last = self._command("run", JOB, *sets)
        if last.code == 1 and all(start.crash for start in self._plan.interrupted):
            last = self._command("run", JOB, *sets)  # two deaths in a row are refused, once
        self._check_last_line(last)
        if last.code != ran.code:
            raise Broken("an interrupted run ends with another code", last)
        output = self._folder / _OTHER_OUTPUT
        check_output(self._folder, job, output, last)
        if stable_results(output) != stable_results(self._output(job)):
            raise Broken("an interrupted run has other results", last)
