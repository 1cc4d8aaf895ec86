"""What is refused before anything is computed, and before anything is written or deleted.

Used by `run` under its lease, and by the commands that only look. Must not know: leases, the run.
Invariant: nothing here writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from batchinfer.config import Job
from batchinfer.errors import ConfigError, InputError
from batchinfer.ledger import layout
from batchinfer.prompt import check_references, check_type, prompt_columns
from batchinfer.sink import output_columns
from batchinfer.source import (
    Footer,
    RowFilter,
    Shard,
    check_columns,
    column_problem,
    in_print,
    matches,
)
from batchinfer.storage import Store, why_no_folder
from batchinfer.tasks import Task

T = TypeVar("T")

_FOOTER_THREADS = 16
_MAX_NAMED_SHARDS = 20


def check_layout(job: Job, task: Task, store: Store, shards: Sequence[Shard]) -> None:
    """Refuse outputs that would be inputs of the next run, inputs inside the output, names that an
    output cannot have, colliding columns.
    """
    if (url := in_print(store.url)) != store.url:
        raise ConfigError(
            f"output.path {url}: control characters and bytes that are not UTF-8 cannot be in it"
        )
    if store.url == "/":
        raise ConfigError("output.path is /, the whole file system: choose a folder of its own")
    if store.is_local and (problem := why_no_folder(Path(store.url))):
        raise ConfigError(f"output.path: {problem}")
    for shard in shards:
        if shard.url == store.url or shard.url.startswith(store.url + "/"):
            raise ConfigError(
                f"input {shard.url} is inside output.path {store.url}: choose another output.path"
            )
        if matches(job.input.path, store.url_of(shard.name)):
            raise ConfigError(
                f"the output file {store.url_of(shard.name)} would match input.path and be read as "
                "input by the next run: choose an output.path outside the input"
            )
    _check_names(store, shards)
    reserved = {"id", *output_columns(task.columns)}
    if colliding := sorted(reserved.intersection(job.input.keep_columns)):
        raise ConfigError(
            f"input.keep_columns: {', '.join(colliding)} would collide with the output's own "
            "columns (the id is always there as `id`); rename them in the input or do not keep them"
        )


def _check_names(store: Store, shards: Sequence[Shard]) -> None:
    """The output's files are named as the input's: refuse names for which that cannot be."""
    names = {shard.name for shard in shards}
    for shard in shards:
        folders = shard.name.split("/")[:-1]
        above = ["/".join(folders[:depth]) for depth in range(1, len(folders) + 1)]
        if {"", ".", ".."}.intersection(folders):
            problem = "a part of that path is not a name"
        elif folders and folders[0] in (layout.META, layout.SUCCESS_KEY):
            problem = f"the output has records of its own at {folders[0]}"
        elif layout.META in folders:
            problem = f"a folder with {layout.META} in it is an output of its own"
        elif store.is_local and (file := next(filter(names.__contains__, above), None)):
            problem = f"{file} would be a file and a folder"
        elif store.is_local and (part := next(filter(_is_part(names), above), None)):
            problem = f"{part} is what a part of another shard is called"
        elif why := _why_no_result(store, shard.name):
            problem = why
        else:
            continue
        raise InputError(
            f"input {in_print(shard.url)} cannot have its results at "
            f"{in_print(store.url_of(shard.name))}: {problem}. Rename it, or narrow input.path"
        )


def _is_part(shards: Collection[str]) -> Callable[[str], bool]:
    """Whether below the folder of parts a folder of input would have the name of a shard's part."""

    def is_part(folder: str) -> bool:
        parsed = layout.parse_part_key(layout.PARTS_PREFIX + folder)
        return parsed is not None and parsed[0] in shards

    return is_part


def _why_no_result(store: Store, shard: str) -> str | None:
    """Why there can be no finished file, or no part, of a shard."""
    part = layout.part_key(shard, layout.PartId(window=0, run=1, sequence=1))
    return store.why_no_file(shard) or store.why_no_file(part)


class _ShardProblem(InputError):
    """What is wrong with a shard, without its name: many shards may have the same."""


def check_schema(
    job: Job, task: Task, row_filter: RowFilter | None, shard: Shard, footer: Footer
) -> None:
    """Raise ConfigError unless the shard has every column that the job reads, of a usable type.

    For `check_shards`, which names the shard.
    """
    partitions = footer.partitions
    needed = _needed_columns(job, task, [*footer.schema.names, *partitions])
    for name in row_filter.columns if row_filter else ():
        needed.setdefault(name, "input.filter")
    for name, setting in needed.items():
        if problem := column_problem(footer, name):
            raise _ShardProblem(f"{setting}: {problem}")
    check_columns(footer, list(needed), shard)
    fields = {name: pa.field(name, pa.string()) for name in partitions}
    fields = {field.name: field for field in footer.schema} | fields
    schema = pa.schema(list(fields.values()))
    try:
        check_type(job.prompt, schema)
        check_references(job.prompt, schema)
        task.check_input(job.prompt, schema)
    except InputError as error:
        raise _ShardProblem(str(error)) from None
    if row_filter is not None:
        row_filter.check(footer.schema, partitions)


def _needed_columns(job: Job, task: Task, available: Sequence[str]) -> dict[str, str]:
    """The columns that the job reads, each with the setting that names it (the first of them)."""
    prompt = job.prompt
    keys = ("column", "template", "messages", "messages_column", "token_ids_column")
    setting = next(f"prompt.{key}" for key in keys if getattr(prompt, key) is not None)
    needed = dict.fromkeys(prompt_columns(prompt, available), setting)
    for name, key in task.input_columns.items():
        needed.setdefault(name, key)
    for name in job.input.keep_columns:
        needed.setdefault(name, "input.keep_columns")
    if job.input.id_column:
        needed.setdefault(job.input.id_column, "input.id_column")
    return needed


def check_shards(shards: Sequence[Shard], check: Callable[[Shard], T]) -> list[T]:
    """What `check` says of each shard, several at a time.

    Raises one InputError that names every shard (up to 20) for which it raised ConfigError.
    """

    def caught(shard: Shard) -> T | ConfigError:
        try:
            return check(shard)
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        answers = list(pool.map(caught, shards))
    found = zip(shards, answers, strict=True)
    errors = [(shard, answer) for shard, answer in found if isinstance(answer, ConfigError)]
    if errors:
        problems: dict[tuple[str, bool], list[Shard]] = {}  # one of the job comes once a shard
        for shard, error in errors:
            key = (str(error), isinstance(error, _ShardProblem))
            problems.setdefault(key, []).append(shard)
        named = [
            text if not is_of_shard and len(places) == len(shards) else _placed(text, places)
            for (text, is_of_shard), places in problems.items()
        ]
        if (num_more := len(named) - _MAX_NAMED_SHARDS) > 0:
            named[_MAX_NAMED_SHARDS:] = [f"and {num_more} more"]
        raise InputError("\n".join(named)) from errors[0][1]
    return [answer for answer in answers if not isinstance(answer, ConfigError)]


def _placed(problem: str, places: Sequence[Shard]) -> str:
    """A problem that some shards have, with the first of them."""
    first = places[0].url
    if first in problem:
        return problem
    more = f" and {len(places) - 1:,} more" if len(places) > 1 else ""
    return f"shard {first}{more}: {problem}"
