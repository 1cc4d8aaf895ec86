"""What vLLM does for a kind of demand: settings of the engine, requests, answers.

Each module of `demands/` has its own as `REQUESTS`. Must not know: any demand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from batchinfer.engine.base import Answer, Demand, Request
from batchinfer.model import Lora


class Requests(Protocol):
    """Requests of one job. Light to make: vLLM is imported only by `shared` and what is below it,
    which raise ConfigError for a value that vLLM does not accept.
    """

    settings: str  # what in the job they are made of, for messages

    def problems(self, options: Mapping[str, Any]) -> Iterable[str]:
        """How a job's `engine.options` break what the task promises, and what to do."""

    def arguments(self, loras: Sequence[Lora]) -> Mapping[str, Any]:
        """Engine arguments that these requests need. Raises ConfigError for an adapter with which
        vLLM cannot serve them.
        """

    def begin(self, options: Mapping[str, Any], tokenizer: Callable[[], Any]) -> None:
        """Get what answers are made with, beside what vLLM gives. Before `shared` and the engine.

        `tokenizer` loads vLLM's. Raises ConfigError for what cannot be had of this model.
        """

    @property
    def uses_seeds(self) -> bool:
        """Whether each request has a seed of its own."""

    @property
    def shared(self) -> Any:
        """What all requests have in common."""

    def params(self, request: Request) -> Any:
        """What vLLM is given beside the token ids."""

    def answer(self, output: Any) -> Answer:
        """What came of a request, or has come so far: `output` is vLLM's."""

    def trial(self) -> Any:
        """`params` of a short request like all others."""

    @property
    def has_to_run(self) -> bool:
        """Whether vLLM finds out only while a request runs that it cannot serve any."""

    def check_trial(self, output: Any) -> None:
        """Raise ConfigError if the trial, which `has_to_run`, did not end as a request does."""


def requests_of(demand: Demand) -> Requests:
    """What vLLM does for a demand that it has a module for."""
    module = importlib.import_module(f"batchinfer.engine.vllm.demands.{demand.wants}")
    of: Callable[[Demand], Requests] = module.REQUESTS
    return of(demand)
