"""Where everything of an output is. Names only: no reading, no writing.

Invariant: a part's name is unique to its writer (window, run number, sequence in the run), because
run numbers are created once; nothing under `_batchinfer/` ends in `.parquet`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

META = "_batchinfer"
SUCCESS_KEY = "_SUCCESS"
JOB_KEY = f"{META}/job.json"
RESTART_KEY = f"{META}/restart.json"
RUNS_PREFIX = f"{META}/runs/"
STATUS_PREFIX = f"{META}/status/"
LEASES_PREFIX = f"{META}/leases/"
JOINED_PREFIX = f"{LEASES_PREFIX}join-"
PARTS_PREFIX = f"{META}/parts/"
PIECES_PREFIX = f"{META}/pieces/"
LOGS_PREFIX = f"{META}/logs/"
UNREADABLE_PREFIX = f"{META}/unreadable/"

_PARTS_SUFFIX = ".parts"
_PIECES_SUFFIX = ".pieces"
_PART_NAME = re.compile(r"w(\d{6,})-r(\d{4,})-(\d{6,})\.part", re.ASCII)


class PartId(NamedTuple):
    """A part within its shard. The order is the fold's order: window, then run, then sequence."""

    window: int
    run: int
    sequence: int

    @property
    def name(self) -> str:
        return f"w{self.window:06d}-r{self.run:04d}-{self.sequence:06d}.part"


def parts_prefix(shard: str) -> str:
    """Prefix of the keys of a shard's parts.

    The folder has a suffix of its own: named like the shard it would end in `.parquet`, and
    recursive globs match folders too.
    """
    return f"{PARTS_PREFIX}{shard}{_PARTS_SUFFIX}/"


def part_key(shard: str, part: PartId) -> str:
    return parts_prefix(shard) + part.name


def parse_part_key(key: str) -> tuple[str, PartId] | None:
    """(shard, part) of a key below PARTS_PREFIX; None for a name that is not a part's."""
    folder, _, name = key.removeprefix(PARTS_PREFIX).rpartition("/")
    shard = folder.removesuffix(_PARTS_SUFFIX)
    match = _PART_NAME.fullmatch(name)
    if match is None or shard == folder:
        return None
    window, run, sequence = map(int, match.groups())
    return shard, PartId(window, run, sequence)


def pieces_prefix(shard: str) -> str:
    """Prefix of the keys of the leases on a shard's pieces."""
    return f"{PIECES_PREFIX}{shard}{_PIECES_SUFFIX}/"


def split_pieces_key(key: str) -> tuple[str, str]:
    """(shard, name) of a key below PIECES_PREFIX."""
    folder, _, name = key.removeprefix(PIECES_PREFIX).rpartition("/")
    return folder.removesuffix(_PIECES_SUFFIX), name


def member_key(number: int) -> str:
    """Of a joined run."""
    return f"{JOINED_PREFIX}{number:06d}.json"


def run_key(run: int) -> str:
    return f"{RUNS_PREFIX}{run:04d}.json"


def status_key(run: int) -> str:
    return f"{STATUS_PREFIX}{run:04d}.json"


def log_key(run: int) -> str:
    return f"{LOGS_PREFIX}{run:04d}.log"


def run_of_key(key: str) -> int | None:
    """The run number in a key such as `_batchinfer/runs/0012.json`, None if there is none."""
    stem = key.rsplit("/", 1)[-1].split(".", 1)[0]
    return int(stem) if stem.isascii() and stem.isdigit() else None
