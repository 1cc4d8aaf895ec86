"""One prompt of a job: of a row of its input, or of a text in its place.

Must not know: engines, outputs. Reads one row, and the footers of the shards before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batchinfer.config import Job, PerRowSettings, PromptSettings
from batchinfer.errors import InputError
from batchinfer.plan import Chunk, WorkItem
from batchinfer.prompt import Prepared, RowPrompter, needed_columns
from batchinfer.runner.checks import check_schema
from batchinfer.runner.start import list_input
from batchinfer.source import RowFilter, Shard, ShardReader, read_footer
from batchinfer.tasks import task_of

#: The column of a text that stands for a row.
_COLUMN = "prompt"


@dataclass(frozen=True, slots=True)
class OneRow:
    """`table` has the row, with the columns that the prompt needs. `is_left_out`: by the filter."""

    shard: str  # "" for a text that is in no shard
    number: int
    table: pa.Table
    is_left_out: bool = False

    def __str__(self) -> str:
        return f"{self.shard}:{self.number}"

    def prepared(self, prompter: RowPrompter) -> Prepared:
        """As it is sent. Raises InputError for a row that cannot become a prompt."""
        prepared = prompter.prepare(self.table)
        for error in prepared.errors.values():
            where = f"row {self}: " if self.shard else ""
            raise InputError(f"{where}{error.kind}: {error.message}")
        return prepared

    def work_item(self, prepared: Prepared) -> WorkItem:
        """The row's first sample, as a run has it: with its seed."""
        chunk = Chunk.of_prompts([prepared.token_ids], first_row=self.number)
        return WorkItem(replace(chunk, shard=self.shard, own=prepared.own), 0, 0)


def with_text(job: Job, text: str, *, is_chat: bool) -> tuple[Job, OneRow]:
    """The job with a prompt that is `text`, and the row for it. `is_chat`: the user says it, after
    what the job's own messages say before the user's and without a column.
    """
    if is_chat:
        messages = [*opening(job.prompt), {"role": "user", "content": text}]
        return with_conversation(job), row_of(messages)
    changed = {"column": _COLUMN, "on_too_long": job.prompt.on_too_long}
    return _with_prompt(job, changed), OneRow("", 0, pa.table({_COLUMN: [text]}))


def for_one(job: Job) -> Job:
    """The job with an engine for one request at a time, unless it says how many: what the others
    would be kept in takes memory, and time to be made ready.
    """
    if job.engine.max_num_seqs != "auto":
        return job
    engine = job.engine.model_copy(update={"max_num_seqs": 1})
    return job.model_copy(update={"engine": engine})


def with_conversation(job: Job) -> Job:
    """The job with prompts that are conversations, see `row_of`; its chat template stays."""
    settings: dict[str, Any] = {"messages_column": _COLUMN, "on_too_long": job.prompt.on_too_long}
    if job.prompt.messages is not None or job.prompt.messages_column is not None:
        settings |= job.prompt.model_dump(include={"chat_template", "chat_template_kwargs"})
    return _with_prompt(job, settings)


def _with_prompt(job: Job, settings: Mapping[str, Any]) -> Job:
    """The job with prompts that are of no row: none has settings of its own."""
    prompt = PromptSettings.model_validate(settings)
    sampling = job.sampling.model_copy(update={"per_row": PerRowSettings()})
    return job.model_copy(update={"prompt": prompt, "sampling": sampling})


def row_of(messages: Sequence[Mapping[str, str]], number: int = 0) -> OneRow:
    """A conversation. `number`: for its seed."""
    return OneRow("", number, pa.table({_COLUMN: [json.dumps(messages)]}))


def opening(prompt: PromptSettings) -> list[Mapping[str, str]]:
    """What a prompt's system says before the user, as far as it is the same in all rows."""
    messages: list[Mapping[str, str]] = []
    for message in prompt.messages or ():
        alone = PromptSettings.model_validate({"messages": [message.model_dump()]})
        if message.role not in ("system", "developer") or needed_columns(alone):
            break
        messages.append(message.model_dump())
    return messages


def find_row(job: Job, place: str | None, columns: Sequence[str]) -> OneRow:
    """The row at `place`: "N", counted over all shards from 0, or "SHARD:N", counted in that shard.
    None: the first that passes the filter.

    Raises InputError if there is none, or the shard lacks what the job needs.
    """
    shards = list_input(job.input, lambda: False)
    row_filter = RowFilter(job.input.filter) if job.input.filter else None
    if place is None:
        return _first(job, shards, columns, row_filter)
    shard, number = _find(shards, place)
    _check(job, shard, row_filter)
    table = _read(shard, number, columns, None)
    assert table is not None
    is_left_out = row_filter is not None and _read(shard, number, columns, row_filter) is None
    return OneRow(shard.name, number, table, is_left_out)


def _first(
    job: Job, shards: Sequence[Shard], columns: Sequence[str], row_filter: RowFilter | None
) -> OneRow:
    for shard in shards:
        _check(job, shard, row_filter)
        with ShardReader(shard, columns, row_filter) as reader:
            num_rows = reader.num_rows if row_filter else min(1, reader.num_rows)
            for block in reader.blocks(0, num_rows):
                if len(block.rows):
                    table = block.table.slice(0, 1)
                    return OneRow(shard.name, int(block.rows[0]), table)
    why = "no row passes input.filter" if row_filter else "the input has no rows"
    raise InputError(f"{why}: there is none to try")


def _find(shards: Sequence[Shard], place: str) -> tuple[Shard, int]:
    name, separator, digits = place.rpartition(":")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
        raise InputError(f"--row {place}: must be a number from 0, or SHARD:NUMBER")
    number = int(digits)
    if separator:
        shard = next((shard for shard in shards if shard.name == name), None)
        if shard is None:
            raise InputError(
                f"--row {place}: there is no shard {name}; the first of {len(shards):,} is "
                f"{shards[0].name}"
            )
        num_rows = read_footer(shard).num_rows
        if number < num_rows:
            return shard, number
        raise InputError(f"--row {place}: {name} has {num_rows:,} rows, counted from 0")
    num_before = 0
    for shard in shards:
        num_rows = read_footer(shard).num_rows
        if number < num_before + num_rows:
            return shard, number - num_before
        num_before += num_rows
    raise InputError(f"--row {place}: the input has {num_before:,} rows, counted from 0")


def _check(job: Job, shard: Shard, row_filter: RowFilter | None) -> None:
    try:
        check_schema(job, task_of(job), row_filter, shard, read_footer(shard))
    except InputError as error:
        raise InputError(f"shard {shard.url}: {error}") from None


def _read(
    shard: Shard, number: int, columns: Sequence[str], row_filter: RowFilter | None
) -> pa.Table | None:
    with ShardReader(shard, columns, row_filter) as reader:
        for block in reader.blocks(number, number + 1):
            if len(block.rows):
                return block.table
    return None
