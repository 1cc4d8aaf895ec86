"""Logprobs of prompts: an engine says how likely each token of a prompt is after those before it.

Requests and answers are those of completions, since an engine generates a token for each; the
`sampling.logprobs` likeliest tokens are asked for at each position of the prompt too. Must not
know: tasks, engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from batchinfer.engine.demands.completion import CompletionDemand


@dataclass(frozen=True, slots=True)
class PromptLogprobsDemand(CompletionDemand):
    """Completions of one token that nobody uses."""

    wants: ClassVar[str] = "prompt_logprobs"

    @property
    def prompt_logprobs_key(self) -> str:
        return f"task: {self.task}"
