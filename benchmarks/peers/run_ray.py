"""Ray Data LLM: `vLLMEngineProcessorConfig` on one engine actor, Parquet to Parquet.

    python -m benchmarks.peers.run_ray WORK_FOLDER OUTPUT_FOLDER

Ray's own defaults for batches (32 rows, 8 at a time) and its two-phase checkpoint by row id. By
default its blocks would join to one of all rows, and so one file at the very end: they are cut at
one batch each.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.events import tell
from benchmarks.peers.work import LIMITS, MODEL, MODEL_ARGUMENTS, NUM_LOGPROBS, SAMPLING

BLOCK_ROWS = 32  # Ray's batch_size


def main(folder: Path, output: Path) -> None:
    import ray  # type: ignore[import-not-found]
    from ray.data.checkpoint import CheckpointConfig  # type: ignore[import-not-found]
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig  # type: ignore[import-not-found]

    output.mkdir(exist_ok=True)
    ray.init(
        object_store_memory=256 << 20,
        include_dashboard=False,
        _temp_dir=str(folder / "ray"),
        runtime_env={"worker_process_setup_hook": _first_request_teller(output)},
    )
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig("id", str(output / "checkpoint"))
    config = vLLMEngineProcessorConfig(
        model_source=str(MODEL),
        engine_kwargs=MODEL_ARGUMENTS | LIMITS,
        placement_group_config={"bundles": [{"CPU": 1}]},  # otherwise it waits for a GPU
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage=False,  # an actor more, with a core of its own; the engine tokenizes
        detokenize_stage=False,
        log_engine_metrics=False,  # this vLLM's metrics classes do not find Ray
    )
    process = build_processor(config, preprocess=_request, postprocess=_result)
    rows = ray.data.read_parquet(str(folder / "in"))
    rows = rows.repartition(target_num_rows_per_block=BLOCK_ROWS)
    process(rows).write_parquet(str(output / "rows"))


def _first_request_teller(output: Path) -> Callable[[], None]:
    """Runs in every worker; one of them loads vLLM, seconds before its first request."""

    def wait() -> None:
        engine: Any = None
        while not hasattr(engine, "AsyncLLM"):  # nobody has imported it yet, or not to its end
            time.sleep(0.1)
            engine = sys.modules.get("vllm.v1.engine.async_llm")
        generate = engine.AsyncLLM.generate

        def timed_generate(self: Any, *arguments: Any, **options: Any) -> Any:
            engine.AsyncLLM.generate = generate
            tell(output, "begin")
            return generate(self, *arguments, **options)

        engine.AsyncLLM.generate = timed_generate

    def start() -> None:
        threading.Thread(target=wait, daemon=True).start()

    return start


def _request(row: dict[str, Any]) -> dict[str, Any]:
    sampling = SAMPLING | {"logprobs": NUM_LOGPROBS, "detokenize": False}
    return {"id": row["id"], "prompt": row["text"], "sampling_params": sampling}


def _result(row: dict[str, Any]) -> dict[str, Any]:
    timing = row["metrics"]
    decode_s = timing["last_token_ts"] - timing["first_token_ts"]
    return {
        "id": row["id"],
        "token_ids": row["generated_tokens"],
        "logprobs": [
            [token["logprob"] for token in position.values()] for position in row["logprobs"]
        ],
        "begin_s": timing["arrival_time"],
        "end_s": timing["arrival_time"] + timing["first_token_latency"] + decode_s,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
