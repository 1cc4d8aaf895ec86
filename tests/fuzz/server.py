"""Commands of batchinfer in forks of one process that has imported everything and loaded the
tokenizer: a tenth of a second for a whole `run`, with the real exit code, signals and last line.

    with Server() as server:
        ended = server.run(["run", "job.yaml"], folder)

The server is a process of its own that never computes anything itself: a fork of a process whose
thread pools are at work would hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.jobs import MODEL, ROOT

TIMEOUT_S = 60.0
_LAST_WORDS_S = 3.0
_MAX_TEXT_BYTES = 200_000
#: A setting that makes a process ask for more is a fault, and must not take the machine with it.
_MAX_MORE_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `code` is negative if a signal ended it."""

    argv: list[str]
    code: int
    stdout: str
    stderr: str
    seconds: float
    is_hung: bool


class Server:
    """Starts commands in the fake engine's process, one after another."""

    def __init__(self) -> None:
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("BATCHINFER", "AWS_"))
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"PYTHONPATH": str(ROOT), "TZ": "UTC"},
            cwd=ROOT,
            text=True,
        )

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        *,
        crash: Mapping[str, Any] | None = None,
        signal_after_s: float | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Ended:
        """Run a command in `folder` and wait. `crash`: as in tests/support/fake_run.py."""
        request = {
            "argv": list(argv),
            "folder": str(folder),
            "crash": crash,
            "signal_after_s": signal_after_s,
            "timeout_s": timeout_s,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of the fuzzer has died"
        return Ended(**json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _warm_up() -> None:
    """Import what commands import, and load the one tokenizer, without torch: a fork of a process
    that has it takes three times as long.
    """
    import pyarrow.compute
    import pyarrow.parquet

    import batchinfer.cli.check
    import batchinfer.cli.plan
    import batchinfer.cli.run
    import batchinfer.cli.show
    import batchinfer.cli.status
    from batchinfer.engine.kinds import KINDS
    from batchinfer.engine.vllm.machine import this_machine
    from batchinfer.prompt import encode
    from batchinfer.testing import FakePlan
    from tests.support.fake_run import fake_kinds

    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    load = encode._load
    loaded = {str(MODEL): load(str(MODEL), trust_remote_code=False)}
    import transformers.utils.chat_template_utils  # noqa: F401

    del sys.modules["torch"]

    def load_once(path: str, *, trust_remote_code: bool) -> Any:
        found = loaded.get(os.path.realpath(path))
        return found or load(path, trust_remote_code=trust_remote_code)

    encode._load = load_once
    KINDS.update(fake_kinds(FakePlan(max_num_seqs=7)))
    assert batchinfer.cli.check and batchinfer.cli.plan and batchinfer.cli.show
    assert pyarrow.compute and pyarrow.parquet
    metadata.version = cache(metadata.version)
    for name in ("pyarrow", "polars"):
        metadata.version(name)
    this_machine()
    gc.collect()
    gc.freeze()


def _child(request: Mapping[str, Any], stdout: int, stderr: int) -> None:
    """The command itself. Never returns."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    faulthandler.enable(os.fdopen(stderr, "w", closefd=False))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MAX_MORE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(request["folder"])
    os.environ["HOME"] = request["folder"]
    from batchinfer.cli import main
    from batchinfer.storage.local import LocalStore
    from tests.support.fake_run import Crash, install

    if request["crash"]:
        install(Crash(**request["crash"]), LocalStore)
    sys.argv = ["batchinfer", *request["argv"]]
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _serve(request: Mapping[str, Any]) -> Ended:
    stdout, stderr = (os.memfd_create(name) for name in ("stdout", "stderr"))
    begun_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(request, stdout, stderr)
    status, is_hung = _wait(pid, request)
    seconds = time.monotonic() - begun_s
    texts = []
    for fd in (stdout, stderr):
        os.lseek(fd, 0, os.SEEK_SET)
        texts.append(os.read(fd, _MAX_TEXT_BYTES).decode("utf-8", "backslashreplace"))
        os.close(fd)
    code = os.waitstatus_to_exitcode(status)
    return Ended(list(request["argv"]), code, texts[0], texts[1], round(seconds, 3), is_hung)


def _wait(pid: int, request: Mapping[str, Any]) -> tuple[int, bool]:
    """The exit status, and whether it had to be killed; its threads then say where they were."""
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        left_s = request["timeout_s"]
        after_s = request["signal_after_s"]
        if after_s is not None and not poll.poll(after_s * 1000):
            os.kill(pid, signal.SIGTERM)
        is_hung = not poll.poll(left_s * 1000)
        if is_hung:
            os.kill(pid, signal.SIGABRT)
            poll.poll(_LAST_WORDS_S * 1000)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1], is_hung
    finally:
        os.close(fd)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    _warm_up()
    for line in sys.stdin:
        answers.write(json.dumps(asdict(_serve(json.loads(line)))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
