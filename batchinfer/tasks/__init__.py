"""What a job computes for each row: its settings, what it asks of the engine, its output columns.

Must not know: files, threads, when something is durable. A new task is a module here with its
section in `config/` and one line in `task_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchinfer.config import Job
from batchinfer.tasks.base import Ask, Column, Detokenize, Result, RowWork, Task
from batchinfer.tasks.generate import COUNTS, Generate

__all__ = [
    "Ask",
    "Column",
    "Detokenize",
    "Generate",
    "Result",
    "RowWork",
    "Task",
    "counts_in",
    "task_of",
]


#: Task -> what it counts.
_COUNTS = {"generate": COUNTS}


def counts_in(facts: Mapping[str, Any]) -> Sequence[str]:
    """Names of what is counted in a footer or `_SUCCESS`; without the name of a task it is of
    generation.
    """
    return _COUNTS.get(facts.get("task", "generate"), ())


def task_of(job: Job) -> Task:
    """The job's task, with its settings."""
    return Generate(job.sampling)
