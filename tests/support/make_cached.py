"""Processes that make one cached checkpoint, forked from one that has imported what they need.

    python -m tests.support.make_cached MODEL METHOD

The first, of another method, is killed in the middle, as by kill -9, and so is the second; then two
start at once. Writes a JSON list with what each of the four said and found: exit code, lines of its
log, folder.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable

from transformers import AutoModelForCausalLM  # noqa: F401 - for the children

from batchinfer.making.cached import cached_checkpoint
from batchinfer.making.tensor_files import TensorFolder
from batchinfer.quantization import Machine
from tests.support.models import read_model

CPU = Machine("cpu", packages=frozenset({"compressed-tensors"}), engine="vllm")
OTHER_METHOD = "int4"
KILLED_AT = 20  # of the demo model's 57 tensors


def make(method: str = sys.argv[2]) -> str:
    model = read_model(sys.argv[1], quantization=method, machine=CPU)
    return str(cached_checkpoint(model))


def make_and_die(method: str = sys.argv[2]) -> str:
    write = TensorFolder.write
    num_written = 0

    def write_(self: TensorFolder, name: str, content: memoryview) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, content)

    TensorFolder.write = write_  # type: ignore[method-assign]
    return make(method)


def fork(call: Callable[[], str]) -> Callable[[], dict[str, object]]:
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the child's end
    pid = os.fork()
    if pid == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=log)
        print(call(), file=log, flush=True)
        os._exit(0)

    def wait() -> dict[str, object]:
        _, status = os.waitpid(pid, 0)
        log.seek(0)
        lines = log.read().splitlines()
        return {"code": os.waitstatus_to_exitcode(status), "lines": lines}

    return wait


if __name__ == "__main__":
    outcomes = [fork(lambda: make_and_die(OTHER_METHOD))(), fork(make_and_die)()]
    waits = [fork(make), fork(make)]
    outcomes += [wait() for wait in waits]
    sys.stdout.write(json.dumps(outcomes))
