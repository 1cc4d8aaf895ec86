"""What vLLM does not report by itself: how long it warmed up, and that its process has ended.

Must not know: requests, settings.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import threading
from multiprocessing.process import BaseProcess
from typing import Any, Self

_CORE_LOGGER = logging.getLogger("vllm.v1.engine.core")


class WarmUpTime(logging.Handler):
    """Reads in vLLM's log how long profiling, compiling and warming up took; None: not said."""

    seconds: float | None = None

    def __enter__(self) -> Self:
        _CORE_LOGGER.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        _CORE_LOGGER.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("init engine") and isinstance(record.args, tuple):
            self.seconds = float(str(record.args[0]))


def watch_core_process(core: Any, processes: list[BaseProcess]) -> None:
    """Wake a step that waits for an engine core in a process of its own when that process dies.

    vLLM's synchronous client reads a queue without a timeout, and its own monitor puts nothing into
    it: after a kill -9 (the OOM killer) `step` would wait forever. Without a process of its own
    the core has no such queue.
    """
    outputs = getattr(core.engine_core, "outputs_queue", None)
    if outputs is None:
        return

    def wait() -> None:
        multiprocessing.connection.wait([process.sentinel for process in processes])
        outputs.put(RuntimeError("its process ended"))

    threading.Thread(target=wait, name="vllm-core-watch", daemon=True).start()
