"""A process of an engine does not wait for a server that is gone."""

from __future__ import annotations

import os
import subprocess
import sys

#: What multiprocessing does first in a process that it spawns.
BEGUN = "import runpy; runpy.run_module('batchinfer.serving.child', run_name='__mp_main__')"


def begun_below(server_pid: int) -> int:
    """The exit code of an engine's process that has nothing else to do."""
    environ = {**os.environ, "BATCHINFER_SERVER_PID": str(server_pid)}
    return subprocess.run([sys.executable, "-c", BEGUN], env=environ, timeout=100).returncode


def test_an_engine_whose_server_died_while_it_was_spawned_ends() -> None:
    """vLLM's would wait five minutes for the server's first word, and be nobody's child."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert begun_below(ended.pid) == 1
    assert begun_below(os.getpid()) == 0
