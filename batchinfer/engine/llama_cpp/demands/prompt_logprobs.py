"""Logprobs of prompts, by llama.cpp: those of completions of one token.

Must not know: how an engine is built or driven.
"""

from __future__ import annotations

from batchinfer.engine.demands.prompt_logprobs import PromptLogprobsDemand
from batchinfer.engine.llama_cpp.demands.completion import CompletionRequests


class PromptLogprobsRequests(CompletionRequests):
    """See `Requests`."""

    def __init__(self, demand: PromptLogprobsDemand) -> None:
        super().__init__(demand)
        self.num_prompt_tops = demand.sampling.logprobs or 0


REQUESTS = PromptLogprobsRequests
