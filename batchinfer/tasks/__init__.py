"""What a job computes for each row: its settings, what it asks of the engine, its output columns.

Must not know: files, threads, when something is durable. A new task is a module here with its
section in `config/` and one line in `task_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchinfer.config import Job
from batchinfer.tasks import generate, score
from batchinfer.tasks.base import Ask, Column, Describe, Detokenize, Result, RowWork, Task
from batchinfer.tasks.generate import Generate
from batchinfer.tasks.score import Score

__all__ = [
    "ALL_COLUMNS",
    "Ask",
    "Column",
    "Describe",
    "Detokenize",
    "Generate",
    "Result",
    "RowWork",
    "Score",
    "Task",
    "counts_in",
    "describer",
    "task_of",
]


#: Task -> what it counts.
_COUNTS = {"generate": generate.COUNTS, "score": score.COUNTS}
#: Task -> every column of its own that it can have.
ALL_COLUMNS: Mapping[str, Mapping[str, Column]] = {
    "generate": generate.COLUMNS,
    "score": score.COLUMNS,
}


def counts_in(facts: Mapping[str, Any]) -> Sequence[str]:
    """Names of what is counted in a footer or `_SUCCESS`; without the name of a task it is of
    generation.
    """
    return _COUNTS.get(facts.get("task", "generate"), ())


def describer(job: Mapping[str, Any]) -> Describe:
    """How rows of a job's results are described; `job` as job.json has it."""
    return score.describe if job.get("task") == "score" else generate.describe


def task_of(job: Job) -> Task:
    """The job's task, with its settings."""
    return Score(job.score) if job.task == "score" else Generate(job.sampling)
