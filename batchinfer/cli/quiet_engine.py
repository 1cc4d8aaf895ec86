"""An engine in a command other than `run`: what it prints goes to a log, which is kept only if it
fails.

Must not know: what the engine is used for.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from batchinfer.cli.debug import is_debug
from batchinfer.cli.watchdog import Watchdog, end_process
from batchinfer.errors import Stopped
from batchinfer.runner import Stop
from batchinfer.telemetry import Stdio


@dataclass(frozen=True, slots=True)
class Quiet:
    """`stop`: asked for by a signal that `watchdog` sees. `stdio`: the real streams; the process's
    lead to the log.
    """

    stop: Stop
    stdio: Stdio
    watchdog: Watchdog


@contextmanager
def quiet_engine() -> Iterator[Quiet]:
    """Send what the engine prints to a log. A signal ends the process before a row is admitted, and
    asks for a stop after that.
    """
    folder = Path(tempfile.mkdtemp(prefix="batchinfer-"))
    log = folder / "engine.log"
    stdio = Stdio(follows=is_debug())
    stop = Stop()

    def say_why(_: int, reason: str) -> None:
        stdio.err.write(f"{reason}\n")
        shutil.rmtree(folder)

    watchdog = Watchdog(stop, last_words=say_why, end=end_process)
    is_kept = True
    try:
        watchdog.watch()
        stdio.redirect(log)
        yield Quiet(stop, stdio, watchdog)
        is_kept = False
    except (Stopped, KeyboardInterrupt):
        is_kept = False
        raise
    finally:
        stdio.close()
        if is_kept and log.exists() and log.stat().st_size:
            click.echo(f"the output of the engine is in {log}", err=True)
        else:
            shutil.rmtree(folder)
