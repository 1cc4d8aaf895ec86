"""Logprobs of prompts, by vLLM: those of completions of one token.

Must not know: how an engine is built or driven.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batchinfer.engine.demands.prompt_logprobs import PromptLogprobsDemand
from batchinfer.engine.vllm.demands.completion import (
    CompletionRequests,
    is_speculative,
    overridden_sampling,
)


class PromptLogprobsRequests(CompletionRequests):
    """See `Requests`."""

    def __init__(self, demand: PromptLogprobsDemand) -> None:
        super().__init__(demand)
        self.num_prompt_tops = demand.sampling.logprobs or 0

    def problems(self, options: Mapping[str, Any]) -> Iterator[str]:
        task = f"task: {self.demand.task}"
        if options.get("skip_tokenizer_init"):
            yield f"engine.options.skip_tokenizer_init is not supported with {task}: remove it"
        yield from self.prompt_problems(options)
        if is_speculative(options):
            yield (
                f"{task} and speculative decoding (engine.options) do not go together: "
                "nothing is generated. Remove the options"
            )
        mode = options.get("logprobs_mode")
        if mode in ("raw_logits", "processed_logits"):
            yield (
                f"engine.options.logprobs_mode {mode} gives no logprobs, which "
                f"{task} is for. Remove it"
            )
        if key := overridden_sampling(options):
            yield (
                f"engine.options.override_generation_config.{key} has no effect with {task}: "
                "remove it"
            )


REQUESTS = PromptLogprobsRequests
