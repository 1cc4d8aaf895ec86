"""What a job computes for each row: its settings, what it asks of the engine, its output columns.

Must not know: files, threads, when something is durable. A new task is a module here that is named
as in the job file and has a `KIND`, and a section in `config/` beside its name there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from batchinfer.config import Job, TaskName
from batchinfer.tasks.base import Ask, Column, Describe, Detokenize, Result, RowWork, Task, TaskKind
from batchinfer.tasks.generate import Generate
from batchinfer.tasks.score import Score

__all__ = [
    "TASKS",
    "Ask",
    "Column",
    "Describe",
    "Detokenize",
    "Generate",
    "Result",
    "RowWork",
    "Score",
    "Task",
    "TaskKind",
    "counts_in",
    "describer",
    "task_of",
]

#: By the name that a job gives.
TASKS: Mapping[str, TaskKind] = {
    name: importlib.import_module(f"{__name__}.{name}").KIND for name in get_args(TaskName)
}


def counts_in(facts: Mapping[str, Any]) -> Sequence[str]:
    """Names of what is counted in a footer or `_SUCCESS`; without the name of a task it is of
    generation.
    """
    kind = TASKS.get(facts.get("task", "generate"))
    if kind is None:
        return ()
    return (*kind.counts, *(name for name in kind.some_counts if name in facts))


def describer(job: Mapping[str, Any]) -> Describe:
    """How rows of a job's results are described; `job` as job.json has it."""
    return TASKS.get(job.get("task", "generate"), TASKS["generate"]).describe


def task_of(job: Job) -> Task:
    """The job's task, with its settings."""
    return TASKS[job.task].of(job)
