"""vLLM's request outputs -> completions: flat numpy arrays, our reasons and times.

Must not know: how an engine is built or driven. Imports nothing of vLLM: it reads attributes that
are the same from 0.26 to 0.33.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from batchinfer.engine.base import Timing
from batchinfer.engine.demands.completion import Completion


def completion_of(output: Any, *, has_text: bool) -> Completion:
    """One finished `RequestOutput` with one sequence as a completion."""
    key = int(output.request_id)
    sequence = output.outputs[0]
    if sequence.finish_reason not in ("stop", "length"):
        return Completion(
            key=key,
            error_type="engine_error",
            error_message=f"vLLM ended the request with finish_reason {sequence.finish_reason!r}",
        )
    ended_by_token = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
    completion = partial_of(output, has_text=has_text)
    completion.num_text_tokens -= ended_by_token
    completion.finish_reason = sequence.finish_reason
    completion.stop_reason = None if sequence.stop_reason is None else str(sequence.stop_reason)
    completion.timing = _timing(output.metrics)
    if output.prompt_logprobs is not None:
        _set_prompt_logprobs(completion, output.prompt_logprobs)
    return completion


def partial_of(output: Any, *, has_text: bool) -> Completion:
    """What the one sequence of a `RequestOutput` has, whether or not it is finished."""
    sequence = output.outputs[0]
    token_ids = np.array(sequence.token_ids, np.int32)  # vLLM's own list grows
    completion = Completion(
        key=int(output.request_id),
        token_ids=token_ids,
        num_text_tokens=len(token_ids),
        text=sequence.text if has_text else None,
        num_cached_tokens=output.num_cached_tokens or 0,
    )
    if sequence.logprobs is not None:
        _set_logprobs(completion, sequence.logprobs)
    return completion


def _set_logprobs(completion: Completion, flat: Any) -> None:
    """Split vLLM's flat form: at each position first the sampled token, then the top k in order.

    The sampled token is there twice when it is one of the top k, so the top lists lose nothing.
    """
    starts = np.asarray(flat.start_indices, np.int32)
    logprobs = np.asarray(flat.logprobs, np.float32)
    completion.token_logprobs = logprobs[starts]
    if len(logprobs) == len(starts):
        return  # logprobs: 0, the sampled tokens alone
    is_top = np.ones(len(logprobs), bool)
    is_top[starts] = False
    # A position ends where the next one starts, and gives up one entry, the sampled token's.
    completion.top_offsets = np.arange(0, -len(starts) - 1, -1, np.int32)
    completion.top_offsets[:-1] += starts
    completion.top_offsets[-1] += len(logprobs)
    completion.top_token_ids = np.asarray(flat.token_ids, np.int32)[is_top]
    completion.top_logprobs = logprobs[is_top]


def _set_prompt_logprobs(completion: Completion, flat: Any) -> None:
    """Split as above. The first token has no logprob, since nothing precedes it, and no entry."""
    starts = np.asarray(flat.start_indices, np.int32)
    num_entries = np.asarray(flat.end_indices, np.int32) - starts
    logprobs = np.asarray(flat.logprobs, np.float32)
    has_logprob = num_entries > 0
    own = np.full(len(starts), np.nan, np.float32)
    own[has_logprob] = logprobs[starts[has_logprob]]
    completion.prompt_token_logprobs = own
    k = int(num_entries.max(initial=1)) - 1
    if not k:
        return
    top_token_ids = np.full((len(starts), k), -1, np.int32)
    top_logprobs = np.full((len(starts), k), np.nan, np.float32)
    # Fewer than k where the vocabulary is smaller: those stay empty.
    places = starts[:, None] + np.arange(1, k + 1)
    is_entry = np.arange(1, k + 1) < num_entries[:, None]
    top_token_ids[is_entry] = np.asarray(flat.token_ids, np.int32)[places[is_entry]]
    top_logprobs[is_entry] = logprobs[places[is_entry]]
    completion.prompt_top_token_ids, completion.prompt_top_logprobs = top_token_ids, top_logprobs


def _timing(stats: Any) -> Timing:
    """Differences of the engine core's monotonic stamps (`arrival_time` is wall clock)."""
    if stats is None:
        return Timing()

    def between(start: float, end: float) -> float | None:
        return end - start if start and end else None  # 0.0: never stamped

    return Timing(
        queued_s=between(stats.queued_ts, stats.scheduled_ts),
        prefill_s=between(stats.scheduled_ts, stats.first_token_ts),
        decode_s=between(stats.first_token_ts, stats.last_token_ts),
        total_s=between(stats.queued_ts, stats.last_token_ts),
    )
