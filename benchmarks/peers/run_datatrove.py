"""datatrove's InferenceRunner against a `vllm serve` of its own, Parquet to Parquet.

    python -m benchmarks.peers.run_datatrove WORK_FOLDER OUTPUT_FOLDER PYTHON_OF_VLLM PORT

Its local checkpoint on, in chunks of 64 documents (6,000 by default: a kill would find none whole).
The server computes logprobs as for the others; datatrove keeps text and token counts only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.peers.events import tell
from benchmarks.peers.work import (
    ENVIRONMENT,
    LIMITS,
    MODEL,
    MODEL_ARGUMENTS,
    MODEL_NAME,
    NUM_LOGPROBS,
    SAMPLING,
    flags,
)

CHUNK_ROWS = 64


def main(folder: Path, output: Path, vllm_python: str, port: int) -> None:
    output.mkdir(exist_ok=True)
    server = subprocess.Popen(
        [
            *(vllm_python, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL)),
            *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
            *flags(MODEL_ARGUMENTS | LIMITS),
        ],
        env=os.environ | ENVIRONMENT,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url + "/health", server)
        _run(folder, output, url)
    finally:
        server.kill()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            if server.poll() is not None:
                sys.exit(f"vllm serve ended with {server.returncode}")
            time.sleep(0.1)


def _run(folder: Path, output: Path, url: str) -> None:
    from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner  # type: ignore[import-not-found]
    from datatrove.pipeline.readers import ParquetReader  # type: ignore[import-not-found]
    from datatrove.pipeline.writers import ParquetWriter  # type: ignore[import-not-found]

    num_sent = 0

    class Runner(InferenceRunner):  # type: ignore[misc]
        async def _send_request(self, *arguments: Any) -> Any:
            nonlocal num_sent
            if num_sent == 0:
                tell(output, "begin")
            num_sent += 1
            result = await super()._send_request(*arguments)
            tell(output, "end", rows=num_sent)
            return result

    async def rollout(document: Any, generate: Any) -> Any:
        result = await generate(SAMPLING | {"prompt": document.text, "logprobs": NUM_LOGPROBS})
        return {"text": result.text, "num_tokens": result.usage["completion_tokens"]}

    LocalPipelineExecutor(
        [
            ParquetReader(str(folder / "in")),
            Runner(
                rollout,
                InferenceConfig(
                    server_type="endpoint",
                    model_name_or_path=MODEL_NAME,
                    endpoint_url=url,
                    use_chat=False,
                ),
                ParquetWriter(
                    str(output / "rows"), "${rank}_chunk_${chunk_index}.parquet", max_file_size=-1
                ),
                checkpoints_local_dir=str(output / "checkpoint"),
                records_per_chunk=CHUNK_ROWS,
            ),
        ],
        logging_dir=str(output / "logs"),
        skip_completed=False,
    ).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
