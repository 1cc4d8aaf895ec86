"""vLLM alone, as somebody without this package would use it: what it answers with each model.

    python -m tests.support.plain_vllm MODEL...

Prints a JSON list for each model: the token ids of its greedy completion of one prompt.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    os.environ |= {
        "VLLM_PLUGINS": "",  # not ours
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    out = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints
    import torch
    from vllm import LLM, SamplingParams

    torch.cpu._init_amx()
    for model in sys.argv[1:]:
        llm = LLM(
            model,
            max_model_len=256,
            max_num_seqs=8,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 25,
        )
        prompt = "Summarize this software package in one line.\n\nlibrary for reading FLAC files"
        (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16))
        os.write(out, (json.dumps(list(answer.outputs[0].token_ids)) + "\n").encode())
        del llm
    os._exit(0)


if __name__ == "__main__":
    main()
