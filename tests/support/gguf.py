"""GGUF files of models in the repository, and the engine that runs them, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from batchinfer.config import load_job
from batchinfer.engine.demands.completion import Completion, CompletionRequest
from batchinfer.engine.llama_cpp.engine import LlamaCppEngine
from batchinfer.engine.llama_cpp.kind import KIND
from batchinfer.making.gguf.make import make
from batchinfer.making.order import LayerCounts, MakingOrder, Reporter
from batchinfer.quantization import RECIPES
from batchinfer.runner.factory import engine_spec, model_of
from tests.support.models import read_model


def make_gguf(source: Path, target: Path, kind: str = "f32") -> LayerCounts:
    """As `batchinfer quantize SOURCE TARGET --method gguf --type KIND`."""
    folder = target.parent / f"{target.name}.made"
    folder.mkdir(parents=True)
    quiet = Reporter(lambda _: None, lambda _: None, lambda _: None)
    order = MakingOrder(
        read_model(str(source)), folder, RECIPES["gguf"], {"type": kind}, [], folder, None
    )
    made = make(order, quiet)
    (folder / "model.gguf").rename(target)
    folder.rmdir()
    return made


@contextmanager
def running(
    file: Path, *, task: str = "generate", **sections: Mapping[str, Any]
) -> Iterator[LlamaCppEngine]:
    """The engine of a job on that file; sections of the job are `sampling`, `engine`, `model`."""
    settings: dict[str, Any] = {
        "version": 1,
        "name": "test",
        "task": task,
        "input": {"path": "in.parquet"},
        "prompt": {"column": "text"},
        "output": {"path": "out"},
        **sections,
    }
    settings["engine"] = {"name": "llama_cpp", **sections.get("engine", {})}
    settings["model"] = {"path": str(file), **sections.get("model", {})}
    path = file.parent / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    job = load_job(str(path)).job
    engine = KIND.build(engine_spec(job, model_of(job)))
    try:
        yield engine
    finally:
        engine.close()


def complete(engine: LlamaCppEngine, *prompts: list[int], **fields: Any) -> list[Completion]:
    """The completions of prompts that are all added at once, in their order."""
    for key, prompt in enumerate(prompts):
        engine.add(CompletionRequest(key, np.array(prompt, np.int32), **fields))
    found: dict[int, Completion] = {}
    while len(found) < len(prompts):
        found |= {answer.key: Completion.of(answer) for answer in engine.step()}
    return [found[key] for key in range(len(prompts))]
