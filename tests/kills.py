"""Runs on several devices, or joined ones, whose processes are killed at random: every row once,
none of the durable ones again.

    python -m tests.kills --kills 200 --devices 3 [--s3] [--seed 1] [--pause-s 2]
    python -m tests.kills --kills 200 --join 10 [--s3] [--seed 1] [--pause-s 2]

On the fake engine, to a local folder or to an S3 server that it starts. Each kill is SIGKILL to a
replica, or, one in four, to the process that gives out the work, which is then started again with
another number of devices; or to one of so many joined runs, in whose place another joins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import yaml

from tests.support.jobs import (
    Place,
    Process,
    job,
    kill,
    results,
    rows,
    run,
    stable,
    start,
    wait,
    write_job,
)
from tests.support.processes import await_end, children_of, is_stopped, kill_one
from tests.support.s3_server import s3_server

SLOW = {"step_s": 0.02, "max_num_seqs": 8}
_KEY = ["shard", "row", "sample"]


class Kills:
    """What was killed, and how much was durable and had been asked of an engine in between."""

    def __init__(self, place: Place, asked: Path) -> None:
        self._place = place
        self._asked = asked
        self._moments: list[tuple[int, int]] = []  # between runs: durable rows, requests so far
        self.num_replicas = self.num_parents = self.num_runs = self.num_refused = 0

    def look(self) -> None:
        """Count what is durable. Nothing runs meanwhile."""
        names = [name for name in self._place.names("out") if name.endswith((".part", ".parquet"))]
        frames = [self._place.read_parquet(f"out/{name}").select(_KEY) for name in names]
        num_durable = pl.concat(frames).n_unique() if frames else 0
        self._moments.append((num_durable, len(self._requests())))

    def _requests(self) -> list[str]:
        """Of all engines so far; each row's is different."""
        return self._asked.read_text().splitlines() if self._asked.exists() else []

    def must_stand(self) -> int:
        """After each of those moments just the rows that were not durable were computed. How many
        were at the last one.
        """
        num_rows, requests = results(self._place).height, self._requests()
        for num_durable, num_asked in self._moments:
            assert len(set(requests[num_asked:])) == num_rows - num_durable, "computed again"
        return self._moments[-1][0] if self._moments else 0


def kill_at_random(
    path: Path,
    place: Place,
    *,
    num_kills: int,
    moments: random.Random,
    most_devices: int = 3,
    pause_s: float = 2.0,
) -> Kills:
    """Start the job until it is complete, killing as often meanwhile, after `pause_s` at most."""
    asked = path.with_suffix(".asked")
    kills, left = Kills(place, asked), num_kills
    settings = yaml.safe_load(path.read_text())
    while True:
        settings["engine"]["devices"] = moments.randint(2, most_devices)
        path.write_text(yaml.safe_dump(settings))
        process = start(path, place=place, fake={**SLOW, "log_file": str(asked)})
        kills.num_runs += 1
        while process.poll() is None:
            time.sleep(moments.uniform(pause_s / 4, pause_s) if left else 0.2)
            if not left:
                continue
            replicas = children_of(process.pid)
            if not replicas or process.poll() is not None:
                continue
            left -= 1
            if moments.random() < 0.25:
                kill_one(process.pid, signal.SIGKILL)
                await_end(*replicas, timeout_s=15)
                kills.num_parents += 1
                break
            kill_one(moments.choice(replicas), signal.SIGKILL)
            kills.num_replicas += 1
        code = process.wait(120)
        _, errors = process.communicate()
        if code == 0:
            return kills
        kills.look()
        # 1: rows that were there at several kills; 75: three kills of each replica before its first
        # durable row. Both say to start again.
        kills.num_refused += code in (1, 75)
        assert code in (-9, 1, 75), f"exit code {code}\n{errors}"


class JoinedKills:
    """Of joined runs: what was durable at each kill, and is not to be asked for after it."""

    def __init__(self, place: Place, asked: Path, crc_of: Mapping[tuple[str, int], str]) -> None:
        """`crc_of` each row, as the fake logs its prompt."""
        self._place = place
        self._asked = asked
        self._crc_of = crc_of
        self._moments: list[tuple[set[str], int]] = []
        self.num_kills = self.num_runs = 0

    def look(self) -> None:
        """Nothing computes meanwhile."""
        keys: set[tuple[str, int]] = set()
        for name in self._place.names("out"):
            if name.endswith((".part", ".parquet")):
                keys.update(self._place.read_parquet(f"out/{name}").select("shard", "row").rows())
        self._moments.append(({self._crc_of[key] for key in keys}, len(self.requests())))

    def requests(self) -> list[str]:
        return self._asked.read_text().splitlines() if self._asked.exists() else []

    def must_stand(self) -> int:
        """How many rows were durable at the last kill; none of them was asked for again."""
        requests = self.requests()
        for durable, num_asked in self._moments:
            again = durable.intersection(requests[num_asked:])
            assert not again, f"{len(again)} durable rows were computed again"
        return len(self._moments[-1][0]) if self._moments else 0


def kill_joined_at_random(
    path: Path,
    place: Place,
    *,
    num_kills: int,
    num_runs: int,
    moments: random.Random,
    crc_of: Mapping[tuple[str, int], str],
    pause_s: float = 2.0,
) -> JoinedKills:
    """Keep so many joined runs at work, killing one after another, until the job is complete."""
    asked = path.with_suffix(".asked")
    kills = JoinedKills(place, asked, crc_of)

    def join() -> Process:
        kills.num_runs += 1
        return start(path, "--join", place=place, fake={**SLOW, "log_file": str(asked)})

    running = [join() for _ in range(num_runs)]
    while kills.num_kills < num_kills:
        time.sleep(moments.uniform(pause_s / 4, pause_s))
        if any(process.poll() is not None for process in running):
            break  # it is complete, as is asserted below
        for process in running:
            stop(process)
        kills.look()
        victim = running.pop(moments.randrange(len(running)))
        kill(victim)
        for process in running:
            kill(process, signal.SIGCONT)
        victim.communicate()
        kills.num_kills += 1
        running.append(join())
    for process in running:
        ended = wait(process)
        assert ended.code == 0, f"exit code {ended.code}\n{ended.stderr}"
        assert ended.result["status"] == "complete"
    return kills


def stop(process: Process) -> None:
    """All of it, and wait for that: it may be in the middle of being started, or of a write."""
    deadline_s = time.monotonic() + 30
    while process.poll() is None and not is_stopped(process.pid):
        assert time.monotonic() < deadline_s, f"{process.pid} does not stop"
        kill(process, signal.SIGSTOP)
        time.sleep(0.02)


def write_input(place: Place, sizes: Sequence[int]) -> None:
    first = 0
    for index, number in enumerate(sizes):
        place.write_parquet(f"in/s{index}.parquet", rows(number, start=first))
        first += number


def requests_of(folder: Path, sizes: Sequence[int]) -> tuple[dict[tuple[str, int], str], Place]:
    """What the fake logs for each row of shards of these sizes; and an output of one run alone."""
    place = Place(str(folder / "reference"))
    write_input(place, sizes)
    log = folder / "reference.asked"
    path = write_job(folder, job(place, engine={"name": "fake"}), "reference.yaml")
    ended = run(path, fake={"log_file": str(log)})
    assert ended.code == 0, ended.stderr
    keys = [
        (f"s{index}.parquet", row) for index, number in enumerate(sizes) for row in range(number)
    ]
    return dict(zip(keys, log.read_text().splitlines(), strict=True)), place


@contextlib.contextmanager
def _place(*, is_s3: bool, folder: Path) -> Iterator[Place]:
    if not is_s3:
        yield Place(str(folder / "data"))
        return
    with s3_server() as server:
        yield Place(f"s3://{server.create_bucket()}", server.environment())


def _kill_joined(
    folder: Path,
    place: Place,
    sizes: Sequence[int],
    num_kills: int,
    moments: random.Random,
    arguments: argparse.Namespace,
) -> dict[str, int]:
    """A job by joined runs, beside the same by one alone."""
    crc_of, alone = requests_of(folder, sizes)
    kills = kill_joined_at_random(
        write_job(folder, job(place, engine={"name": "fake"})),
        place,
        num_kills=num_kills,
        num_runs=arguments.join,
        moments=moments,
        crc_of=crc_of,
        pause_s=arguments.pause_s,
    )
    assert stable(results(place)).equals(stable(results(alone))), "other rows than those of one run"
    assert not place.parts(), "parts are left"
    kept = kills.must_stand()
    counts = {"kills": kills.num_kills, "jobs": 1, "rows_kept": kept}
    return counts | {"runs": kills.num_runs, "rows": sum(sizes)}


def _say(line: Mapping[str, int]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--join", type=int, metavar="N", help="kill N joined runs instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--pause-s", type=float, default=2.0, help="between kills, at most")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    total = {"kills": 0, "jobs": 0, "rows_kept": 0}
    begun_s = time.monotonic()
    while total["kills"] < arguments.kills:
        with (
            tempfile.TemporaryDirectory(prefix="batchinfer-kills-") as name,
            _place(is_s3=arguments.s3, folder=Path(name)) as place,
        ):
            sizes = [moments.choice((0, 1, 30, 64, 300, 1500)) for _ in range(5)] + [2000]
            write_input(place, sizes)
            settings = job(place, engine={"name": "fake", "devices": 1})
            path = write_job(Path(name), settings)
            left = arguments.kills - total["kills"]
            if arguments.join:
                line = _kill_joined(Path(name), place, sizes, left, moments, arguments)
                for key in total:
                    total[key] += line[key]
                _say({"seconds": round(time.monotonic() - begun_s), **line, **total})
                continue
            kills = kill_at_random(
                path,
                place,
                num_kills=left,
                moments=moments,
                most_devices=arguments.devices,
                pause_s=arguments.pause_s,
            )
            have = stable(results(place))
            alone = write_job(Path(name), settings | {"output": {"path": place.url("alone")}}, "b")
            ended = run(alone, place=place)
            assert ended.code == 0, ended.stderr
            assert have.equals(stable(results(place, "alone"))), (
                "other rows than those of one device"
            )
            total["jobs"] += 1
            total["kills"] += kills.num_replicas + kills.num_parents
            total["rows_kept"] += kills.must_stand()
            line = {"seconds": round(time.monotonic() - begun_s), **total, "runs": kills.num_runs}
            line |= {"parents": kills.num_parents, "refused": kills.num_refused, "rows": sum(sizes)}
            _say(line)


if __name__ == "__main__":
    main()
