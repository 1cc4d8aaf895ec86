"""Completions of llama.cpp. Must not know: how an engine is built or driven."""

from __future__ import annotations

from batchinfer.config import SamplingSettings
from batchinfer.engine.demands.completion import CompletionDemand
from batchinfer.engine.regexes import unreadable
from batchinfer.errors import ConfigError


class CompletionRequests:
    """See `Requests`."""

    #: How many of the likeliest tokens at each position of a prompt come with its logprobs.
    num_prompt_tops = 0

    def __init__(self, demand: CompletionDemand) -> None:
        self.sampling = demand.sampling

    def check(self) -> None:
        check_together(self.sampling)
        if why := unreadable(self.sampling.structured):
            raise ConfigError(why)
        if self.sampling.reasoning_parser is not None:
            raise ConfigError(
                "sampling.reasoning_parser: the parsers are vLLM's, and the engine llama_cpp has "
                "none: leave the key out, and thought and answer are both the completion, or run "
                "the model on engine: {name: vllm}"
            )


def check_together(sampling: SamplingSettings) -> None:
    """Raise ConfigError for settings, the job's or a row's, that llama.cpp cannot compute."""
    if sampling.structured is not None and sampling.ignore_eos:
        raise ConfigError(
            "sampling.ignore_eos and sampling.structured do not go together in llama.cpp: what a "
            "grammar has ended cannot go on; remove one of them"
        )


REQUESTS = CompletionRequests
