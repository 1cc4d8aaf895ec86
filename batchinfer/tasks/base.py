"""What a task is to the rest of the program.

A row goes through it in this order: `work` says which requests the engine gets for it, and makes
one answer of what comes back; `arrays` turns answers into the task's own columns; `count`
says what a table of them adds to the totals. The columns of every task (key, times, error) belong
to the sink. Must not know: files, threads, how an engine works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchinfer.config import Job, PromptSettings
from batchinfer.engine.base import Answer, Demand, Int32Array, Request
from batchinfer.model import ModelFacts
from batchinfer.plan import Chunk, WorkItem
from batchinfer.prompt import RowPrompter

#: token ids (flat), offsets [n + 1] -> n texts
Detokenize = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int64]], list[str]]
#: A result as a row of the output -> its text (None: it has none) and some facts, for people.
Describe = Callable[[Mapping[str, Any]], tuple[str | None, list[str]]]
#: Type and description of an output column.
Column = tuple[pa.DataType, str]


@dataclass(slots=True, eq=False)
class Result:
    """An answer with its place: row `index` of `chunk`, sample `sample`."""

    chunk: Chunk
    index: int
    sample: int
    answer: Answer
    finished_at_us: int  # microseconds since the epoch
    duplicate_of: int | None = None  # row number
    #: About what it holds in memory until it is durable, its row's columns included.
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = 600 + self.chunk.carried_row_bytes + self.answer.num_bytes


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to be: what the engine needs besides a key. A task may have a kind of its own."""

    token_ids: Int32Array

    def request(self, key: int) -> Request:
        return Request(key, self.token_ids)


class RowWork(Protocol):
    """One (row, sample) on its way through the engine. Used by one thread."""

    def asks(self) -> Iterator[Ask]:
        """The requests, made one at a time; others' are admitted in between. May be none."""

    def add(self, ask: Ask, answer: Answer) -> None:
        """Take in what came of a request, in any order, unless it is an error; `ask` is one of
        `asks`. Raises RowError if it cannot be used.
        """

    def answer(self) -> Answer:
        """What came of the row, once every request of `asks` was added."""


@dataclass(slots=True, eq=False)
class OneRequest:
    """The work of a task whose rows are one request each: its answer is the result."""

    ask: Ask
    result: Answer | None = None

    def asks(self) -> Iterator[Ask]:
        return iter((self.ask,))

    def add(self, ask: Ask, answer: Answer) -> None:
        self.result = answer

    def answer(self) -> Answer:
        assert self.result is not None
        return self.result


class Task(Protocol):
    """A task with a job's settings. Stateless; used by several threads."""

    @property
    def name(self) -> str:
        """As in the job file."""

    @property
    def num_samples(self) -> int:
        """Results of each row."""

    @property
    def is_repeatable(self) -> bool:
        """Whether equal prompts have equal results, so that one may serve for all of them."""

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a result, None if only the row decides; see `num_tokens`."""

    @property
    def demand(self) -> Demand:
        """What it asks of the engine for every request."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """Its own output columns, in order; they depend on the settings alone. One of them is
        `num_prompt_tokens`, which every task's totals have.
        """

    @property
    def counts(self) -> Sequence[str]:
        """Names of what `count` counts, as they appear in footers and `_SUCCESS`; the first is that
        of the tokens of results.
        """

    @property
    def facts(self) -> Mapping[str, Any]:
        """Its name, unless it is `generate`, and its settings, as footers have them."""

    @property
    def input_columns(self) -> Mapping[str, str]:
        """Input columns that it needs besides those of the prompt, each with its setting."""

    def check_input(self, prompt: PromptSettings, schema: pa.Schema) -> None:
        """Raise InputError if `input_columns` have types that no row could use."""

    def prompter(self, job: Job, model: ModelFacts) -> RowPrompter:
        """What makes rows into tokens; loads the tokenizer. Raises ConfigError for settings that do
        not fit the model.
        """

    def work(self, item: WorkItem, max_model_len: int) -> RowWork:
        """Begin a (row, sample) on an engine that takes `max_model_len` tokens a request."""

    def num_tokens(self, answer: Answer, num_prompt_tokens: int) -> int:
        """Tokens of a result that speed and remaining time are measured in.

        `num_prompt_tokens`: of its row, all that the engine was given.
        """

    def arrays(self, results: Sequence[Result], detokenize: Detokenize) -> Mapping[str, pa.Array]:
        """`columns` of results [n], failed ones included, whose values are null."""

    def count(self, table: pa.Table) -> Mapping[str, int]:
        """`counts` of a table with all columns of an output, and what else a run warns of."""

    def remarks(self, num_done: int, counts: Mapping[str, int | None]) -> Iterable[str]:
        """Warnings about `num_done` results without errors, with their `counts`, see `count`;
        None: some of them were not counted. Not all that is counted need be in `counts`.
        """


@dataclass(frozen=True, slots=True)
class TaskKind:
    """What is known of a task without a job: `KIND` of its module."""

    of: Callable[[Job], Task]
    columns: Mapping[str, Column]  # all that it can have, in order
    counts: Sequence[str]  # see `Task.counts`
    describe: Describe  # of a row of its output
    some_counts: Sequence[str] = ()  # besides `counts`, with some settings
    repeating: Sequence[str] = ()  # columns of few different values, which files take advantage of


def num_failed(table: pa.Table) -> int:
    """Rows of a table of results that are errors."""
    return int(table.num_rows - table.column("error_type").null_count)


def row_values(
    results: Sequence[Result], column: Callable[[Chunk], npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    """`column` of a chunk at each result's row; one look-up for results that follow each other in
    a chunk. [n]
    """
    taken = []
    for _, group in groupby(results, key=lambda result: id(result.chunk)):
        of_chunk = list(group)
        taken.append(column(of_chunk[0].chunk)[[r.index for r in of_chunk]])
    return np.concatenate(taken)
