"""The schema of parts and finished files (they are the same).

Must not know: how values come about. Invariant: the columns depend on the job alone, never on what
a run happened to compute, so every file of an output has the same schema where its input has.
"""

from __future__ import annotations

import pyarrow as pa

#: Raised when a column changes its name, type or meaning: it is part of the job digest.
SCHEMA_VERSION = 1

#: name -> (type, description). Order is the order in the file, after `id` and the kept columns.
OUTPUT_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "shard": (pa.string(), "the input file, relative to the longest glob-free prefix"),
    "row": (pa.int64(), "row number in the input file, from 0"),
    "sample": (pa.int32(), "0 .. sampling.n - 1; (shard, row, sample) is the key of a result"),
    "completion": (pa.string(), "the generated text, without special tokens"),
    "parsed": (pa.string(), "with json_schema: the completion if it is valid JSON"),
    "finish_reason": (pa.string(), "stop | length"),
    "stop_reason": (pa.string(), "stop string or stop token id; null for the model's own end"),
    "num_prompt_tokens": (pa.int32(), "tokens of the prompt after the chat template"),
    "num_cached_tokens": (pa.int32(), "prompt tokens found in the prefix cache"),
    "num_completion_tokens": (pa.int32(), "generated tokens, the stop token included"),
    "token_ids": (pa.list_(pa.int32()), "generated tokens, the stop token included"),
    "token_logprobs": (pa.list_(pa.float32()), "natural-log probability of each generated token"),
    "cumulative_logprob": (pa.float64(), "sum of token_logprobs"),
    "top_token_ids": (
        pa.list_(pa.list_(pa.int32())),
        "the k likeliest tokens at each position, best first",
    ),
    "top_logprobs": (pa.list_(pa.list_(pa.float32())), "their natural-log probabilities"),
    "prompt_token_logprobs": (
        pa.list_(pa.float32()),
        "natural-log probability of each prompt token, NaN first",
    ),
    "queued_s": (pa.float32(), "seconds from admission to the first scheduled step"),
    "prefill_s": (pa.float32(), "seconds from there to the first token"),
    "decode_s": (pa.float32(), "seconds from the first to the last token"),
    "total_s": (pa.float32(), "seconds from admission to the last token"),
    "finished_at": (pa.timestamp("us", tz="UTC"), "when the row was finished"),
    "attempt": (pa.int32(), "number of the run that computed the row (runs/NNNN.json)"),
    "duplicate_of": (pa.int64(), "row of this shard with the same prompt whose result was used"),
    "error_type": (pa.string(), "null for a result; otherwise why there is none"),
    "error_message": (pa.string(), "the same as a sentence"),
}

_TOP_COLUMNS = ("top_token_ids", "top_logprobs")


def output_schema(
    carried: list[pa.Field], *, has_top_logprobs: bool, has_prompt_logprobs: bool
) -> pa.Schema:
    """Schema of an output file: the carried fields (`id` first), then ours."""
    fields = list(carried)
    for name, (data_type, _) in OUTPUT_COLUMNS.items():
        if name in _TOP_COLUMNS and not has_top_logprobs:
            continue
        if name == "prompt_token_logprobs" and not has_prompt_logprobs:
            continue
        fields.append(pa.field(name, data_type))
    return pa.schema(fields)
