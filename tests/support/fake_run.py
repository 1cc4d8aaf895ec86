"""`batchinfer run` on the fake engine, with crashes at named steps. A double for subprocesses.

FAKE_ENGINE (JSON): the fields of FakePlan. A job may name the engine `fake`; one that names
vLLM, or none, is checked as for vLLM and run on the fake.

CRASH (JSON): {"op": "publish" | "put" | "create" | "delete", "key": regex, "when": "before" |
"written" | "after", "nth": n, "signal_name": "SIGKILL"}: signal ourselves at the n-th such step.
"written": a publish whose content is written, but which is not visible yet. A delete of several
keys counts one by one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, BinaryIO

from batchinfer.cli import main
from batchinfer.cli import run as cli_run
from batchinfer.cli.watchdog import Watchdog
from batchinfer.config import Job
from batchinfer.engine.base import Engine, EngineKind, EngineSpec, Placement
from batchinfer.engine.kinds import KINDS
from batchinfer.engine.vllm.kind import VllmKind
from batchinfer.ledger import members
from batchinfer.prompt import encode
from batchinfer.runner import heartbeat, start, take_over
from batchinfer.runner.replicas import fleet, on_ray, relay
from batchinfer.runner.replicas.process import ReplicaProcess
from batchinfer.storage.local import LocalStore
from batchinfer.storage.s3 import S3Store
from batchinfer.testing import FakeKind, FakePlan, LightTokenizer, fake_kind, register


class FakeVllm(VllmKind):
    """Checks and sizes jobs as for vLLM, so that they are refused and resumed as with it; runs them
    on the fake engine.
    """

    def __init__(self, plan: FakePlan) -> None:
        self._fake = fake_kind(plan)

    def placements(self, job: Job) -> Sequence[Placement]:
        return self._fake.placements(job)

    def num_gpus(self, job: Job) -> int:
        return self._fake.num_gpus(job)

    def prepare(self, spec: EngineSpec) -> None:
        pass

    def load(self) -> None:
        pass

    def build(self, spec: EngineSpec) -> Engine:
        return self._fake.build(spec)


def fake_kinds(plan: FakePlan) -> dict[str, Callable[[], EngineKind]]:
    """What stands in `KINDS` for jobs that name no engine, or vLLM."""
    return {"vllm": lambda: FakeVllm(plan)}


class NoLease:
    """A lease that holds nobody off: what a lost or stolen one comes to."""

    def beat(self) -> None: ...

    def check(self) -> None: ...

    def proof(self) -> NoLease:
        return self

    def open(self, store: object) -> NoLease:
        return self

    def release(self) -> None: ...

    def undo(self) -> None: ...


class Crash:
    """Counts matching steps and kills, or stops, at the n-th."""

    def __init__(
        self, op: str, key: str, when: str, nth: int = 1, signal_name: str = "SIGKILL"
    ) -> None:
        self.op, self.pattern, self.when, self.left = op, re.compile(key), when, nth
        self.signal = signal.Signals[signal_name]

    def reached(self, op: str, key: str, when: str) -> None:
        if (op, when) == (self.op, self.when) and self.pattern.search(key):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signal)


def install(crash: Crash, store: type) -> None:
    put, create, delete = store.put, store.create, store.delete

    def publishing(publish: Callable[..., Any]) -> Callable[..., Any]:
        def publish_(self: Any, key: str, write: Callable[[BinaryIO], None]) -> Any:
            def written(sink: BinaryIO) -> None:
                write(sink)
                sink.flush()
                crash.reached("publish", key, "written")

            crash.reached("publish", key, "before")
            is_ours = publish(self, key, written)
            crash.reached("publish", key, "after")
            return is_ours

        return publish_

    def put_(self: Any, key: str, content: bytes) -> None:
        crash.reached("put", key, "before")
        put(self, key, content)
        crash.reached("put", key, "after")

    def create_(self: Any, key: str, content: bytes) -> bool:
        crash.reached("create", key, "before")
        is_created = create(self, key, content)
        crash.reached("create", key, "after")
        return is_created

    def delete_(self: Any, keys: Iterable[str]) -> None:
        for key in keys:
            crash.reached("delete", key, "before")
            delete(self, [key])
            crash.reached("delete", key, "after")

    store.publish, store.publish_once = map(publishing, (store.publish, store.publish_once))
    store.put, store.create, store.delete = put_, create_, delete_


def prepare_fakes() -> None:
    """Fakes and faults in this process, as the environment says."""
    if spec := os.environ.get("CRASH"):
        for store in (LocalStore, S3Store):
            install(Crash(**json.loads(spec)), store)
    if os.environ.get("FAKE_NO_LEASE"):
        take_over.acquire_lease = lambda *_, **__: NoLease()
    if open_files := os.environ.get("FAKE_OPEN_FILES"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(open_files), int(open_files)))
    if beat_s := os.environ.get("FAKE_BEAT_S"):
        heartbeat.BEAT_S = float(beat_s)
    if stale_s := os.environ.get("FAKE_STALE_S"):
        members.STALE_S = float(stale_s)
    if grace_s := os.environ.get("FAKE_GRACE_S"):
        cli_run.Watchdog = partial(Watchdog, grace_s=float(grace_s))
    if "FAKE_REAL_TOKENIZER" not in os.environ:
        encode._load = lambda path, **_: LightTokenizer(path)
    if retry_s := os.environ.get("FAKE_RETRY_S"):
        start.open_store = partial(start.open_store, retry_s=float(retry_s))
    if silent_s := os.environ.get("FAKE_SILENT_S"):
        fleet.SILENT_S = float(silent_s)
    if wait_s := os.environ.get("FAKE_WAIT_S"):
        on_ray.WAIT_S = float(wait_s)
    if gpus := os.environ.get("FAKE_GPUS"):
        FakeKind.num_gpus = lambda self, job: int(gpus)
    relay.CARRIED += ["FAKE_", "PYTHONPATH"]  # fakes are the same on every node
    plan = FakePlan(**json.loads(os.environ.get("FAKE_ENGINE", "{}")))
    KINDS.update(fake_kinds(plan))
    register("fake", fake_kind(plan))


def run() -> None:
    """The command line, as the environment says."""
    prepare_fakes()
    ReplicaProcess.module = "tests.support.fake_replica"
    if sys.argv[1] == "compare":
        from batchinfer.cli import comparison
        from tests.support.fake_child import PROGRAM

        comparison.compare = partial(comparison.compare, program=PROGRAM)
    if sys.argv[1] == "serve":
        from batchinfer.serving import ServerProcess

        ServerProcess.module = "tests.support.fake_server"
    sys.argv[0] = "batchinfer"
    main()


if __name__ == "__main__":
    run()
