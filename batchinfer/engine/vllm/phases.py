"""What vLLM is busy with while it loads, from its log: weights, compiling, graphs take minutes.

Must not know: who listens. A sentence that another version words otherwise costs its phase alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Beginnings of what vLLM 0.26 to 0.33 logs, and what it does from then on.
_PHASES = {
    "Starting to load model": "loading the weights",
    "Model loading took": "measuring memory",
    "Dynamo bytecode transform": "compiling the model",
    "Compiling a graph": "compiling the model",
    "Compile and warming up model": "compiling the model",
    "Profiling CUDA graph memory": "capturing CUDA graphs",
    "Graph capturing finished": "warming up the model",
    "Warming up model": "warming up the model",
}


@contextmanager
def reported_phases(report: Callable[[str], None]) -> Iterator[None]:
    """Report the phases of an engine that is built meanwhile in this process."""
    handler = _Phases(report)
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Phases(logging.Handler):
    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        message = str(record.msg)
        for beginning, phase in _PHASES.items():
            if message.startswith(beginning):
                self._report(phase)
