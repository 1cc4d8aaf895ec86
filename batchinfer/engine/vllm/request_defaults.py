"""A job's sampling as what vLLM's server takes where a request does not say.

Five values are the server's own defaults, which hold at every endpoint. The others it has no
default for, or only a wrong one (`max_new_tokens` of its generation config caps what requests ask
for): these are written into the requests for completions and chats. Must not know: HTTP, vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchinfer.config import SamplingSettings

#: What the server reads from `override_generation_config`.
_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
#: A request that says one of the keys has said what the first stands for.
SAID_BY: Mapping[str, Sequence[str]] = {
    "max_tokens": ("max_tokens", "max_completion_tokens"),
    "structured_outputs": ("structured_outputs", "response_format", "tools"),
}
#: Endpoints whose requests have these keys.
PATHS = ("/v1/completions", "/v1/chat/completions")

_CONSTRAINTS = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}


def generation_config(sampling: SamplingSettings) -> dict[str, Any]:
    """What stands above the model's own generation config."""
    return {name: getattr(sampling, name) for name in _OWN}


def request_values(sampling: SamplingSettings) -> dict[str, Any]:
    """Keys of a request's body, with the job's values where they are not vLLM's own defaults."""
    values: dict[str, Any] = {"max_tokens": sampling.max_tokens}
    for name in ("presence_penalty", "frequency_penalty", "ignore_eos"):
        if value := getattr(sampling, name):
            values[name] = value
    for name in ("stop", "stop_token_ids"):
        if value := getattr(sampling, name):
            values[name] = list(value)
    if sampling.seed is not None:
        values["seed"] = sampling.seed
    if sampling.thinking_budget_tokens is not None:
        values["thinking_token_budget"] = sampling.thinking_budget_tokens
    if sampling.structured is not None:
        kind, constraint = sampling.structured.constraint
        values["structured_outputs"] = {_CONSTRAINTS[kind]: constraint}
    return values
