"""OpenAI's batch files: lines of requests become rows of a job, its results lines of answers.

A run in between is like any other, so what it has finished is durable. Must not know: click,
processes, engines.
"""

from batchinfer.openai_batch.batch import Batch, BatchFiles
from batchinfer.openai_batch.finish import Written

__all__ = ["Batch", "BatchFiles", "Written"]
