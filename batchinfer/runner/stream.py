"""One request at a time through an engine, watched while it runs.

Must not know: files, terminals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from batchinfer.engine.base import Completion, Engine, Request, StreamingEngine
from batchinfer.errors import RowError
from batchinfer.tasks import Ask


@dataclass(slots=True)
class Pace:
    """When things happened, monotonic seconds. `first_s`, `last_s`: of the first and last token
    that was seen; None before.
    """

    begun_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0

    def see(self, completion: Completion) -> None:
        if len(completion.token_ids) > self.num_tokens:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
            self.num_tokens = len(completion.token_ids)


class Stream:
    """Completions of one request while it grows. Iterate once; `pace` fills meanwhile.

    The last one has a `finish_reason` or an error, unless `should_stop` ended it. Of an engine that
    does not stream there is only the last.
    """

    def __init__(self, engine: Engine, ask: Ask, key: int, should_stop: Callable[[], bool]) -> None:
        """`key`: not used by this engine before."""
        self._engine = engine
        self._request = Request(key, ask.token_ids, ask.seed, ask.next_token, is_streamed=True)
        self._should_stop = should_stop
        self.pace = Pace(time.monotonic())

    def __iter__(self) -> Iterator[Completion]:
        """Raises EngineDied, and RowError if the engine refuses the request."""
        engine, key = self._engine, self._request.key
        engine.add(self._request)
        while True:
            if self._should_stop():
                if isinstance(engine, StreamingEngine):
                    engine.abort(key)
                return
            finished = [c for c in engine.step() if c.key == key]
            if finished:
                self.pace.see(finished[0])
                if finished[0].error_type is not None:
                    raise RowError(finished[0].error_type, finished[0].error_message or "")
                yield finished[0]
                return
            if isinstance(engine, StreamingEngine):
                completion = engine.so_far(key)
                self.pace.see(completion)
                yield completion
