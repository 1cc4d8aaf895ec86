"""The program that calibrates a checkpoint, run by llm-compressor's own Python.

    python -I in_llm_compressor.py SETTINGS.json

Nothing of batchinfer is installed there: it knows the keys of the settings file and no more. What
llm-compressor prints goes to stderr; its progress bars are read there.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Keys: model, target, modifiers, preset, texts, max_tokens."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():
        # AWQ in 0.14.0.1 pins memory for copies to a device, and fails where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    encoded = tokenizer(settings["texts"], truncation=True, max_length=settings["max_tokens"])
    dataset = Dataset.from_dict({"input_ids": encoded["input_ids"]})
    layers: dict[str, Any] = {
        "targets": ["Linear"],
        "ignore": ["lm_head"],
        "scheme": settings["preset"],
    }
    *first, last = map(named, settings["modifiers"])
    oneshot(
        model=model,
        dataset=dataset,
        recipe=[*(modifier() for modifier in first), last(**layers)],
        max_seq_length=settings["max_tokens"],
        num_calibration_samples=len(dataset),
    )
    model.save_pretrained(settings["target"], save_compressed=True)


def named(name: str) -> Any:
    """What `name`, "module:Class", names."""
    module, _, member = name.partition(":")
    return getattr(importlib.import_module(module), member)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
