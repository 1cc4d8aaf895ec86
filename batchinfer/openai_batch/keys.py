"""The keys of a request's body, those of OpenAI's and of vLLM's endpoints: which are honoured,
which have no bearing on an answer here, and which ask for something that is not done.

Must not know: lines, how a key is honoured. Invariant: `refuse_key` lets no other key pass than
those of the tables, and none of those that ask for something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchinfer.config.values import shown
from batchinfer.openai_batch.lines import LineError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

#: Keys that are a setting of `sampling` by the same name.
PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
#: Keys that change no answer here. OpenAI's say who asks and at what price; vLLM's are of its
#: scheduler and caches, of its other endpoints, or of images.
WITHOUT_BEARING = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",  # of tools, and lines with tools are refused
        "priority",
        "request_id",
        "session_id",
        "cache_salt",
        "return_token_offsets",
        "mm_payload",
        "return_mm_kwargs",
        "stream_interval",
        "length_penalty",  # of a beam search, which is refused
        "truncation_side",  # of truncate_prompt_tokens, which is refused
    }
)
#: Keys of what is not done here: with these values they ask for nothing.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "bad_words": ([],),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "watermarking": (False,),
    "include_reasoning": (True,),
    "thinking_token_budget": (-1,),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    "routed_experts_prompt_start": (0,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
}
#: A chat template writes the special tokens, a tokenizer those of a text.
_NOTHING_AT: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    CHAT: {"add_special_tokens": (False,)},
    COMPLETIONS: {"add_special_tokens": (True,)},
}
#: Keys of whole numbers, and of lists of them. A null beside them makes floats of a Parquet
#: column, and JSON has one kind of number.
_WHOLE = (
    "max_tokens",
    "max_completion_tokens",
    "n",
    "best_of",
    "top_k",
    "seed",
    "logprobs",
    "top_logprobs",
    "stop_token_ids",
    "prompt",
)


def with_whole_numbers(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body, with 8 for 8.0 where a key takes no fraction."""
    return {key: _whole(value) if key in _WHOLE else value for key, value in body.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def refuse_key(url: str, key: str, value: Any) -> None:
    """Raise LineError for a key that is not honoured, unless it asks for nothing."""
    if key in WITHOUT_BEARING:
        return
    nothing = _NOTHING_AT[url].get(key, _NOTHING.get(key))
    if nothing is None:
        raise unsupported(key)
    if not any(value == one and _is_bool(value) == _is_bool(one) for one in nothing):
        allowed = " or ".join(map(shown, nothing))
        raise LineError(
            f"{key}: {shown(value)} is not supported, {allowed} is", "unsupported_parameter", key
        )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def unsupported(key: str) -> LineError:
    """What is said of a key that asks for something that is not done."""
    return LineError(f"{key} is not supported", "unsupported_parameter", key)
