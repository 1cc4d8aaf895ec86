"""One request at a time through an engine, watched while it runs.

Must not know: files, terminals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from batchinfer.engine.base import Answer, Engine, StreamingEngine
from batchinfer.engine.demands.completion import Completion, CompletionRequest
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
        request = ask.request(key)
        assert isinstance(request, CompletionRequest)
        self._request = replace(request, is_streamed=True)
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
            finished = [a for a in engine.step() if a.key == key]
            if finished:
                yield self._seen(finished[0])
                return
            if isinstance(engine, StreamingEngine) and (answer := engine.so_far(key)) is not None:
                yield self._seen(answer)

    def _seen(self, answer: Answer) -> Completion:
        if answer.error_type is not None:
            raise RowError(answer.error_type, answer.error_message or "")
        completion = Completion.of(answer)
        self.pace.see(completion)
        return completion
