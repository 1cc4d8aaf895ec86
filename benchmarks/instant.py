"""The command line on an engine that answers at once: the process `benchmarks.memory` measures.

    python -m benchmarks.instant run JOB.yaml   # a job that names the engine `instant`

It stalls now and then, so that the reader gets as far ahead as it may, and then the writer as far
behind. BENCHMARK_MARK names a file for the moment of the first admission and the peak until then.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from batchinfer.cli import main  # first, as in the program: it chooses Arrow's allocator
from batchinfer.engine.base import EngineFacts, EngineSpec, Request, Timing
from batchinfer.engine.demands.completion import Completion, CompletionDemand
from batchinfer.prompt import encode
from batchinfer.testing import FakeKind, LightTokenizer, register
from benchmarks.common import peak_bytes_of

STALL_EVERY, STALL_S = 60_000, 1.0  # requests, seconds; the first stall is that of a loading model


class InstantEngine:
    """Answers every request in the next step; writes down when the first one came."""

    def __init__(self, max_tokens: int, num_logprobs: int, mark: Path) -> None:
        self._max_tokens = max_tokens
        self._num_logprobs = num_logprobs
        self._mark = mark
        self._waiting: list[Request] = []
        self._num_added = 0
        self.facts = EngineFacts("instant", "0", "none", "float32", "none", 2048, 1024, 8192, None)

    def num_tokens_in_flight(self) -> int:
        return 0  # each finishes in one step

    @property
    def num_running(self) -> int:
        return self.facts.max_num_seqs

    def add(self, request: Request) -> None:
        if not self._num_added:
            self._mark.write_text(f"{time.time()} {peak_bytes_of()}")
        self._num_added += 1
        self._waiting.append(request)

    def step(self) -> list[Completion]:
        if self._num_added // STALL_EVERY != (self._num_added - len(self._waiting)) // STALL_EVERY:
            time.sleep(STALL_S)
        waiting, self._waiting = self._waiting, []
        return [self._complete(request.key) for request in waiting]

    def close(self) -> None: ...

    def _complete(self, key: int) -> Completion:
        n, k = self._max_tokens, self._num_logprobs
        token_ids = (np.arange(n, dtype=np.int32) * 7919 + key) % 4000 + 10
        return Completion(
            key=key,
            token_ids=token_ids,
            num_text_tokens=n,
            finish_reason="length",
            token_logprobs=(-token_ids / 1000).astype(np.float32),
            top_offsets=np.arange(0, n * k + 1, k, dtype=np.int32),
            top_token_ids=np.repeat(token_ids, k),
            top_logprobs=np.repeat((-token_ids / 1000).astype(np.float32), k),
            timing=Timing(0.0, 0.001, 0.002, 0.003),
        )


def _build(spec: EngineSpec) -> InstantEngine:
    time.sleep(STALL_S)
    assert isinstance(spec.demand, CompletionDemand)
    sampling = spec.demand.sampling
    mark = Path(os.environ["BENCHMARK_MARK"])
    return InstantEngine(sampling.max_tokens, sampling.logprobs, mark)


if __name__ == "__main__":
    encode._load = lambda path, **_: LightTokenizer(path)  # transformers belongs to an engine's own
    register("instant", FakeKind(_build))
    sys.argv[0] = "batchinfer"
    main()
