"""Many cases, and a summary: how they ended, and what broke with the folder that shows it.

python -m tests.fuzz --cases 10000 --seed 1 --keep /tmp/found
python -m tests.fuzz --seed 1 --cases 500 --shrink hangs --keep /tmp/found
python -m tests.fuzz --replay /tmp/found/some-kind
"""

from __future__ import annotations

import argparse
import faulthandler
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.case import Case, Plan, cases, keep, restore, scratch
from tests.fuzz.check import check
from tests.fuzz.server import Ended, Server
from tests.fuzz.wrong import Broken

_PROGRESS_S = 30.0


class Fuzzer:
    """Runs cases and notes what broke: one folder for each kind."""

    def __init__(self, server: Server, kept: Path | None, ignored: re.Pattern[str] | None) -> None:
        self._server = server
        self._kept = kept
        self._ignored = ignored
        self._begun_s = self._told_s = time.monotonic()
        self.num_cases = 0
        self.codes: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.num_ignored = 0
        self.slowest_s = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun_s

    def try_case(self, case: Case) -> Broken | None:
        self.num_cases += 1
        begun_s = time.monotonic()
        with scratch() as root:
            folder = Path(root) / "case"
            folder.mkdir()
            case.write(folder)
            try:
                self.codes += _checked(folder, case.plan, self._server)
                return None
            except Broken as broken:
                if self._ignored is not None and self._ignored.search(broken.kind):
                    self.num_ignored += 1
                    return None
                self._note(broken, folder)
                return broken
            finally:
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun_s)
                self._tell()

    def _note(self, broken: Broken, folder: Path) -> None:
        self.broken[broken.kind] += 1
        if self.broken[broken.kind] > 1:
            return
        click.echo(f"{self.num_cases}: {broken.kind}")
        if self._kept is not None:
            kept = self._kept / _slug(broken.kind, len(self.broken))
            keep(folder, kept)
            (kept / "broken.txt").write_text(str(broken))

    def _tell(self) -> None:
        if time.monotonic() - self._told_s > _PROGRESS_S:
            self._told_s = time.monotonic()
            broken = sum(self.broken.values())
            click.echo(f"{self.num_cases} cases, {broken} broken, {self.seconds:.0f} s")

    def report(self, seed: int) -> None:
        click.echo(
            f"{self.num_cases} cases in {self.seconds:.0f} s (seed {seed}): "
            f"{sum(self.broken.values())} broken, {len(self.broken)} kinds"
            + (f", {self.num_ignored} ignored" if self._ignored else "")
            + f"; slowest {self.slowest_s:.1f} s"
        )
        for name, count in sorted(self.codes.items()):
            click.echo(f"  {count:6} {name}")
        for kind, count in self.broken.most_common():
            click.echo(f"  {count:6} BROKEN {kind}")


def _checked(folder: Path, plan: Plan, server: Server) -> Counter[str]:
    try:
        return check(folder, plan, server)
    except Broken:
        raise
    except Exception as error:  # a case too odd for the checker is a fault of the checker
        text = traceback.format_exc()
        nothing = Ended([], 0, "", text, 0.0, False)
        raise Broken(f"the checker fails: {type(error).__name__}", nothing) from error


def _slug(kind: str, number: int) -> str:
    return f"{number:03}-" + re.sub(r"[^a-zA-Z0-9]+", "-", kind)[:60].strip("-")


def fuzz(fuzzer: Fuzzer, num_cases: int, seed: int) -> None:
    _given_cases(fuzzer.try_case, num_cases, seed, (Phase.generate,))()


def shrink(fuzzer: Fuzzer, kind: str, num_cases: int, seed: int, kept: Path | None) -> None:
    """The smallest case that breaks `kind` (a regular expression)."""
    smallest: list[tuple[Case, Broken]] = []

    def trial(case: Case) -> None:
        broken = fuzzer.try_case(case)
        if broken is not None and re.search(kind, broken.kind):
            smallest[:] = [(case, broken)]
            raise broken

    try:
        _given_cases(trial, num_cases, seed, (Phase.generate, Phase.shrink))()
    except Broken as broken:
        case = smallest[-1][0]
        click.echo(f"{broken}\n\n{case.job_text}\n\n{case.plan}")
        for name, (table, _) in case.source.shards.items():
            click.echo(f"{name}\n{table}")
        if kept is not None:
            folder = kept / _slug(broken.kind, 0)
            folder.mkdir(parents=True)
            case.write(folder)


def _given_cases(
    trial: Callable[[Case], object], num_cases: int, seed: int, phases: tuple[Phase, ...]
) -> Callable[[], None]:
    @hypothesis.seed(seed)
    @settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(case=cases())
    def run(case: Case) -> None:
        trial(case)

    return run


def replay(server: Server, kept: Path) -> None:
    """A kept case once more. Raises Broken."""
    with scratch() as root:
        folder = Path(root) / "case"
        folder.mkdir()
        check(folder, restore(kept, folder), server)


def main() -> int:
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for cases that broke something")
    parser.add_argument("--ignore", type=re.compile, help="kinds that are known")
    parser.add_argument("--shrink", metavar="KIND", help="find the smallest case of a kind")
    parser.add_argument("--replay", type=Path, help="run a kept case")
    given_ = parser.parse_args()
    with Server() as server:
        if given_.replay:
            replay(server, given_.replay)
            click.echo("holds")
            return 0
        fuzzer = Fuzzer(server, given_.keep, given_.ignore)
        if given_.shrink:
            shrink(fuzzer, given_.shrink, given_.cases, given_.seed, given_.keep)
        else:
            fuzz(fuzzer, given_.cases, given_.seed)
        fuzzer.report(given_.seed)
    return 1 if fuzzer.broken else 0


if __name__ == "__main__":
    sys.exit(main())
