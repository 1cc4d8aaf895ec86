"""`vllm run-batch`, told to say when it begins to read and when it begins to write.

    python -m benchmarks.peers.run_batch OUTPUT_FOLDER FLAGS_OF_RUN_BATCH...

The command's own functions with its own flags; the clock is put around them.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.events import tell


def main(output: Path, words: list[str]) -> None:
    from vllm.entrypoints.launchers import run_batch

    generate, write = run_batch.run_batch, run_batch.write_file

    async def timed_generate(*arguments: Any) -> None:
        tell(output, "begin")
        await generate(*arguments)

    async def timed_write(path: str, responses: list[Any], folder: str) -> None:
        tell(output, "end", rows=len(responses))
        await write(path, responses, folder)

    run_batch.run_batch, run_batch.write_file = timed_generate, timed_write
    output.mkdir(exist_ok=True)
    sys.argv = ["vllm run-batch", *words]
    asyncio.run(run_batch.main(run_batch.parse_args()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
