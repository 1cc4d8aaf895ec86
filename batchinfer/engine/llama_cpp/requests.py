"""What llama.cpp does for a kind of demand. Each module of `demands/` has its own as `REQUESTS`.

Must not know: any demand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

from batchinfer.config import SamplingSettings
from batchinfer.engine.base import Demand


class Requests(Protocol):
    """Requests of one job."""

    sampling: SamplingSettings  # how tokens are chosen, and which logprobs are wanted
    num_prompt_tops: int  # likeliest tokens at each position of a prompt

    def check(self) -> None:
        """Raise ConfigError for what llama.cpp cannot compute."""


def requests_of(demand: Demand) -> Requests:
    """What llama.cpp does for a demand that it has a module for."""
    module = importlib.import_module(f"batchinfer.engine.llama_cpp.demands.{demand.wants}")
    of: Callable[[Demand], Requests] = module.REQUESTS
    return of(demand)
