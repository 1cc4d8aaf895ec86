"""A case: an input and a job file as a folder, and what is started on them.

A folder is what is kept of a case that broke a promise: it stays the same case when strategies
change.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.jobs import job_texts
from tests.fuzz.tables import Input, inputs
from tests.support.jobs import ROOT

JOB, INPUT, PLAN = "job.yaml", "in", "plan.json"

_LOOKS = (
    ("explain", JOB),
    ("validate", JOB, "--ids"),
    ("plan", JOB),
    ("plan", JOB, "--no-tokenizer"),
    ("status", "out"),
    ("status", JOB, "--json"),
    ("show", "out"),
    ("show", "out", "--json", "-n", "100"),
    ("show", JOB, "--failed"),
)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A start that does not do all: by its options, at a step of the store, or by a signal."""

    options: tuple[str, ...] = ()
    crash: dict[str, Any] | None = None
    signal_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is started besides `validate` and `run`."""

    looks: tuple[tuple[str, ...], ...] = ()
    #: Starts on an output of its own, before one that does the rest. Empty: no such output.
    interrupted: tuple[Interrupted, ...] = ()
    #: Settings of those starts that must not change a result.
    sets: tuple[str, ...] = ()
    is_repeated: bool = False  # the same starts once more, which must answer the same
    is_grown: bool = False  # the last shard comes after the first of the interrupted starts

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        found = json.loads(text)
        return cls(
            tuple(map(tuple, found["looks"])),
            tuple(
                Interrupted(tuple(i["options"]), i["crash"], i["signal_after_s"])
                for i in found["interrupted"]
            ),
            tuple(found["sets"]),
            found["is_repeated"],
            found.get("is_grown", False),
        )


@dataclass(frozen=True, slots=True)
class Case:
    source: Input
    job_text: str
    plan: Plan = field(default_factory=Plan)

    def write(self, folder: Path) -> None:
        """Below `folder`, with the demo model where the job file expects it."""
        self.source.write(folder / INPUT)
        (folder / JOB).write_bytes(self.job_text.encode("utf-8", "surrogatepass"))
        (folder / PLAN).write_text(self.plan.to_json())
        (folder / "jobs").symlink_to(ROOT / "jobs")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for cases, in memory where there is some: a run waits twenty times for a disk."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=place)


def restore(kept: Path, folder: Path) -> Plan:
    """A kept case in a folder of its own."""
    for name in (INPUT, JOB, PLAN):
        source = kept / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    (folder / "jobs").symlink_to(ROOT / "jobs")
    return Plan.from_json((folder / PLAN).read_text())


def keep(folder: Path, kept: Path) -> None:
    """The case in `folder`, without what commands wrote."""
    kept.mkdir(parents=True)
    for name in (INPUT, JOB, PLAN):
        source = folder / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, kept / name)


_CRASHES = st.builds(
    lambda op, key, when, nth: Interrupted(crash=dict(op=op, key=key, when=when, nth=nth)),
    st.sampled_from(("publish", "put", "create", "delete")),
    st.sampled_from(("", r"\.part$", r"\.parquet$", "_SUCCESS", "runs/")),
    st.sampled_from(("before", "written", "after")),
    st.integers(1, 4),
)
_INTERRUPTIONS: Sequence[st.SearchStrategy[tuple[Interrupted, ...]]] = (
    st.integers(1, 6).map(lambda limit: (Interrupted(("--limit", str(limit))),)),
    st.lists(_CRASHES, min_size=1, max_size=2).map(tuple),
    st.sampled_from((0.01, 0.05, 0.08, 0.1, 0.15)).map(
        lambda after_s: (Interrupted(signal_after_s=after_s),)
    ),
    st.just((Interrupted(("--shard", "1/2")), Interrupted(("--shard", "2/2")))),
    st.just((Interrupted(), Interrupted(("--retry-failed",)))),
    st.just((Interrupted(("--limit", "2")), Interrupted(("--restart",)))),
    st.just(()),
)
_PACKINGS = (
    "packing.order=prefix",
    "packing.order=length",
    "packing.window_rows=2",
    "packing.buffer_tokens=5",
    "packing.batch_rows=1",
    "packing.deduplicate=false",
    "checkpoint.every_rows=1",
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    kind = draw(st.sampled_from(("plain", "plain", "looks", "interrupted")))
    if kind == "plain":
        return Plan()
    if kind == "looks":
        looks = draw(st.lists(st.sampled_from(_LOOKS), min_size=1, max_size=2, unique=True))
        return Plan(looks=tuple(looks), is_repeated=draw(st.booleans()))
    interrupted = draw(st.one_of(_INTERRUPTIONS))
    sets = draw(st.lists(st.sampled_from(_PACKINGS), max_size=2, unique=True))
    return Plan(
        interrupted=interrupted or (Interrupted(),),
        sets=tuple(sets) if interrupted else ("packing.order=prefix",),
        is_grown=not interrupted,
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    source = draw(inputs())
    return Case(source, draw(job_texts(source)), draw(plans()))
