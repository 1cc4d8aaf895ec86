"""The program of an entry's process: REQUEST WORK ANSWER PARENT -> record or error, and warnings.

Must not know: specs, other entries.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from batchinfer.errors import BatchInferError, exit_code_of
from batchinfer.evaluation.comparison.cache import write_whole
from batchinfer.evaluation.perplexity import measure
from batchinfer.evaluation.record import PerplexityRequest
from batchinfer.telemetry.logs import Warnings

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Measure; the exit code is the error's."""
    _die_with_parent(int(arguments.pop()))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asked, work, answer = map(Path, arguments)
    request = PerplexityRequest.model_validate_json(asked.read_bytes())
    content: dict[str, Any]
    with Warnings() as warned:
        try:
            content = {"record": measure(request, work=work).model_dump(mode="json")}
        except BatchInferError as error:
            content = {"error": str(error), "exit_code": exit_code_of(error)}
    content["warnings"] = warned.texts()
    write_whole(answer, json.dumps(content).encode())
    return int(content.get("exit_code", 0))


def _die_with_parent(parent: int) -> None:
    """A comparison that is killed leaves nothing running: nobody would wait for its answer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before we asked
        os._exit(1)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # as libraries of an engine hang at exit
