"""Runs the contenders in turn and prints the table; see the package."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.common import ROOT
from benchmarks.peers.contenders import BASE, CONTENDERS, Rows, log_of
from benchmarks.peers.processes import Family
from benchmarks.peers.report import OURS, Killed, Measurement, make_report, table
from benchmarks.peers.work import Work, write_work

DOCS = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
VARIABLES = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
MAX_RUN_S = 300.0
MAX_RESTART_S = 120.0  # a whole job takes half of it


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--rows", type=int, default=320, help="prompts, at most 1,200")
    parser.add_argument("--repeats", type=int, default=2, help="undisturbed runs of each")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--no-kill", action="store_true", help="undisturbed runs only")
    parser.add_argument("--json", type=Path, default=None, help="write all numbers to this file")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a family is killed on the way out
    started_s = time.monotonic()
    names = [name for name in CONTENDERS if name in (BASE, *arguments.only)]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        contest = Contest(write_work(Path(folder), arguments.rows))
        contest.leave_out_absent(names)
        for repeat in range(arguments.repeats):
            # In turn, so that what else the machine does meets all of them.
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                contest.measure(name, repeat)
        if not arguments.no_kill:
            for name in filter(lambda name: CONTENDERS[name].is_killed, names):
                contest.kill_half_way(name)
    report = make_report(
        contest.measured,
        contest.killed,
        contest.left_out,
        lengths=[_length(tokens) for tokens in contest.completions.values()],
    )
    text = table(report)
    click.echo(text)
    click.echo(f"({time.monotonic() - started_s:.0f} s)", err=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.write:
        head, _, rest = DOCS.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        DOCS.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


class Failed(Exception):
    """A peer did not do the job; the message is what the table says of it."""


@dataclass(slots=True)
class Contest:
    """What was measured so far. `completions`: of the first run of the base, by id."""

    work: Work
    measured: dict[str, list[Measurement]] = field(default_factory=dict)
    killed: dict[str, Killed] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    completions: dict[str, object] = field(default_factory=dict)

    def leave_out_absent(self, names: list[str]) -> None:
        for name in names:
            if not CONTENDERS[name].python.exists():
                self.left_out[name] = "not installed: `make bench-peers-setup`"

    def measure(self, name: str, repeat: int) -> None:
        if name in self.left_out:
            return
        try:
            run = self._run(name, self.work.folder / f"{name}-{repeat}")
        except Failed as failure:
            self._give_up(name, failure)
            return
        self.measured.setdefault(name, []).append(run)
        click.echo(
            f"{repeat + 1} {name}: {run.generation_s:.2f} s of generation, to disk in "
            f"{run.durable_s:.2f} s, {run.cpu_s:.2f} CPU s, whole job {run.job_s:.1f} s",
            err=True,
        )

    def _run(self, name: str, output: Path) -> Measurement:
        contender = CONTENDERS[name]
        family = self._start(name, output)
        self._finish(name, family)
        begin_s, end_s = contender.times(output)
        durable_s = max(path.stat().st_ctime for path in contender.files(output))
        rows = contender.rows(output)
        self._check(rows)
        return Measurement(
            generation_s=end_s - begin_s,
            generation_cpu_s=family.cpu_s_between(begin_s, end_s),
            durable_s=durable_s - begin_s,
            cpu_s=family.cpu_s_between(begin_s, durable_s),
            job_s=durable_s - family.started_s,
            num_tokens=sum(_length(tokens) for _, tokens in rows),
        )

    def kill_half_way(self, name: str) -> None:
        """SIGKILL to all its processes when half of its generation is done, then a second start.

        Half is counted in CPU seconds: by the clock a machine that has got busier since would be
        killed with less done, and one contender would lose more than another by chance.
        """
        if name in self.left_out:
            return
        contender, output = CONTENDERS[name], self.work.folder / f"{name}-killed"
        cpu_s = statistics.median(run.generation_cpu_s for run in self.measured[name])
        family = self._start(name, output)
        try:
            family.wait(lambda: contender.has_begun(output), MAX_RUN_S)
            begun_cpu_s = family.cpu_s
            family.wait(lambda: family.cpu_s - begun_cpu_s >= cpu_s / 2, MAX_RUN_S)
            share_done = (family.cpu_s - begun_cpu_s) / cpu_s
            is_alive = family.exit_code is None
        finally:
            family.kill()
        if not is_alive:
            click.echo(f"{name} ended before it could be killed", err=True)
            return
        num_on_disk = len({row_id for row_id, _ in contender.rows(output)})
        family = self._start(name, output)
        failure = ""
        try:
            self._finish(name, family, MAX_RESTART_S)
        except Failed as failed:
            failure = str(failed)
        counts = Counter(row_id for row_id, _ in contender.rows(output))
        self.killed[name] = Killed(
            share_done=share_done,
            num_on_disk=num_on_disk,
            failure=failure,
            num_computed=contender.num_computed(output, family.started_s) if not failure else 0,
            num_missing=len(self.work.ids - counts.keys()),
            num_duplicated=sum(count > 1 for count in counts.values()),
        )
        click.echo(f"killed {name}: {self.killed[name]}", err=True)

    def _start(self, name: str, output: Path) -> Family:
        contender = CONTENDERS[name]
        variables = VARIABLES | dict(contender.variables)
        return Family(contender.command(self.work, output), variables, log_of(output))

    def _finish(self, name: str, family: Family, max_s: float = MAX_RUN_S) -> None:
        try:
            if not family.wait(lambda: False, max_s):
                raise Failed(f"not done after {max_s:g} s")
            if family.exit_code:
                raise Failed(f"ended with {family.exit_code}")
        finally:
            family.kill()  # what it left behind

    def _check(self, rows: Rows) -> None:
        """Every row once, and the same completions as the base: otherwise it is other work."""
        completions = dict(rows)
        if len(completions) != len(rows) or completions.keys() != self.work.ids:
            raise Failed(f"{len(rows)} rows on disk of {len(self.work.ids)}")
        if not self.completions:
            self.completions = dict(completions)
        for row_id, tokens in completions.items():
            expected = self.completions[row_id]
            if tokens != (_length(expected) if isinstance(tokens, int) else expected):
                raise Failed(f"another completion than the base's for {row_id}")

    def _give_up(self, name: str, failure: Failed) -> None:
        """A peer is left out with its reason; without the base or ours there is no contest."""
        log = sorted(self.work.folder.glob(f"{name}-*.log"), key=lambda p: p.stat().st_mtime)[-1]
        last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        click.echo(f"{name}: {failure}\n{last}", err=True)
        if name in (BASE, OURS):
            sys.exit(1)
        self.measured.pop(name, None)
        self.left_out[name] = str(failure)


def _length(tokens: object) -> int:
    return tokens if isinstance(tokens, int) else len(tokens)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
