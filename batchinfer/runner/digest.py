"""What decides the content of an output, and the digests that tell one such job from another.

Must not know: storage, leases, what is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchinfer.checkpoint import records
from batchinfer.config import Job
from batchinfer.model import ModelFacts
from batchinfer.sink.schema import SCHEMA_VERSION
from batchinfer.source import Shard

# Of vLLM's engine arguments; the others size the engine or say how it computes the same.
_OPTIONS_THAT_CHANGE_RESULTS = frozenset(
    {
        "hf_overrides",
        "load_format",
        "logits_processors",
        "override_generation_config",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
    }
)


def digest_ingredients(job: Job, model: ModelFacts) -> dict[str, Any]:
    """What decides the content of the output. Everything else may change between runs."""
    dump = job.model_dump(mode="json")
    # Settings that came later are there only where they are used: older outputs keep their digest.
    chosen = {
        "kv_cache_dtype": job.model.kv_cache_dtype if job.model.kv_cache_dtype != "auto" else None,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "prompt": dump["prompt"],
        "sampling": dump["sampling"],
        "input": {name: dump["input"][name] for name in ("filter", "id_column", "keep_columns")},
        "model": {
            "dtype": model.dtype,
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,  # decides what is too long, and what is cut
            "content": dict(model.digest),
            **{name: value for name, value in chosen.items() if value is not None},
        },
        "engine_options": {
            name: value
            for name, value in dump["engine"]["options"].items()
            if name in _OPTIONS_THAT_CHANGE_RESULTS
        },
    }


def complete_digest(digest: str, shards: Sequence[Shard]) -> str:
    """What `_SUCCESS` holds: the job and the input listing together."""
    return records.digest_of(
        {
            "job": digest,
            "input": records.listing_digest((s.name, s.size_bytes, s.version) for s in shards),
        }
    )
