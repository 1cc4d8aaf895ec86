"""Why an engine core in a process of its own has ended, told by that process.

To whoever started it vLLM says only that it failed. What a failure means (`errors`) needs the error
itself, its frames and the devices as they are at that moment. Must not know: servers.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.engine.hardware import Memory
from batchinfer.engine.vllm.settings import VllmSettings
from batchinfer.errors import BatchInferError, ConfigError, EngineDied, MemoryHeld, TransientError

#: Names the file with a `Circumstances`, for the engine core that this process starts.
VARIABLE = "BATCHINFER_ENGINE_CIRCUMSTANCES"
CORE_LOGGER = "vllm.v1.engine.core"
#: How vLLM's engine core says that it ends; 0.26 to 0.33.
_NOT_STARTED, _ENDED = "EngineCore failed to start", "EngineCore encountered a fatal error"

_KINDS = (ConfigError, EngineDied, MemoryHeld, TransientError)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What `errors` has to know beside the error. `memory`: of the device before the start."""

    arguments: dict[str, Any]
    settings: VllmSettings
    memory: Memory | None
    told_in: str  # the file that tells of a failure

    def pass_on(self, path: Path) -> None:
        """To the engine core that this process starts after this."""
        path.write_bytes(pickle.dumps(self))
        os.environ[VARIABLE] = str(path)

    def told(self) -> BatchInferError | None:
        """What the engine core has ended with. None: it has not told anything."""
        try:
            name, message = json.loads(Path(self.told_in).read_bytes())
        except FileNotFoundError:
            return None
        return next(kind for kind in _KINDS if kind.__name__ == name)(message)


class FailureTold(logging.Handler):
    """Writes what the error means with which vLLM's engine core ends."""

    def __init__(self, circumstances: Circumstances) -> None:
        super().__init__()
        self._circumstances = circumstances

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        text = record.getMessage()
        if isinstance(error, Exception) and text.startswith((_NOT_STARTED, _ENDED)):
            with suppress(Exception):  # the log has it all the same
                self._tell(error, is_start=text.startswith(_NOT_STARTED))

    def _tell(self, error: Exception, *, is_start: bool) -> None:
        from batchinfer.engine.vllm.errors import construction_error, step_error

        known = self._circumstances
        sizes = known.arguments["max_num_seqs"], known.arguments["max_num_batched_tokens"]
        if is_start:
            meaning = construction_error(error, known.arguments, known.settings, known.memory)
        else:
            meaning = step_error(
                error, known.settings, sizes, is_worker_dead=False, is_killed=False
            )
        path = Path(known.told_in)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps([type(meaning).__name__, str(meaning)]))
        temporary.rename(path)


def tell_failures() -> None:
    """In a process of vLLM's: tell why it ends, if anybody has asked for that."""
    if path := os.environ.get(VARIABLE):
        circumstances = pickle.loads(Path(path).read_bytes())
        logging.getLogger(CORE_LOGGER).addHandler(FailureTold(circumstances))
