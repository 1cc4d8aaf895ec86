"""Several `batchinfer run`s of the real engine, for the price of one import.

    python -m tests.support.run_many JOB...

vLLM's imports are most of a small run's time: this process imports once, and each job runs in a
fork of it, from the command line's own entry to its `os._exit`. Writes a line for each job: its
exit code, and the last line of its stdout. What one of them prints on stderr goes to ours.
"""

from __future__ import annotations

import os
import sys
import tempfile

from batchinfer.cli import main
from batchinfer.engine.vllm_setup import prepare_environment


def run_in_fork(job: str) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as stdout:
        pid = os.fork()
        if pid == 0:
            os.dup2(stdout.fileno(), 1)
            sys.argv[1:] = ["run", job]
            main()
            os._exit(1)  # a run ends the process itself
        _, status = os.waitpid(pid, 0)
        stdout.seek(0)
        lines = stdout.read().splitlines()
    return os.waitstatus_to_exitcode(status), lines[-1] if lines else "{}"


if __name__ == "__main__":
    prepare_environment(weights_bytes=0, is_local_model=True)
    from batchinfer.engine.vllm import import_engine

    import_engine()
    for path in sys.argv[1:]:
        code, line = run_in_fork(path)
        sys.stdout.write(f"{code} {line}\n")
        sys.stdout.flush()
