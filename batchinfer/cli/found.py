"""What is here already: input and models in the current folder, columns and values of an input.

Must not know: what anybody is asked. Invariants: a large folder is looked at in part; of an input a
listing, one footer and a few rows are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchinfer.config import InputSettings, PromptSettings
from batchinfer.errors import InputError, printable
from batchinfer.ledger import layout
from batchinfer.prompt import check_type
from batchinfer.runner.start import list_input
from batchinfer.source import Footer, Shard, ShardReader, column_problem, read_footer

_MAX_DEPTH = 3
_MAX_ENTRIES = 5000
_NUM_VALUES = 3
#: Of a model in several GGUF files the first is named.
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_MAX_SHOWN_COLUMNS = 30
#: Names that columns with prompts have, the surest first.
_PROMPT_NAMES = (
    *("messages", "conversation", "conversations", "prompt", "question", "instruction", "query"),
    *("text", "input", "content", "description", "document", "body"),
)


@dataclass(frozen=True, slots=True)
class Here:
    """What the current folder and those in it have, the nearest first."""

    inputs: Sequence[str]  # globs
    models: Sequence[str]  # folders, and GGUF files


def find_here() -> Here:
    """Look at the first `_MAX_ENTRIES` names, folder by folder, and into no output or model."""
    inputs: list[tuple[int, int, str]] = []  # depth, -files, glob
    models = []
    for depth, folder, files in _folders():
        if "config.json" in files and any(name.endswith(".safetensors") for name in files):
            models.append(folder)
            continue
        for name in files:
            if name.endswith(".gguf") and not _LATER_PART.search(name):
                models.append(os.path.join(folder, name))  # noqa: PTH118
        if tables := [name for name in files if name.endswith(".parquet")]:
            inputs.append((depth, -len(tables), os.path.join(folder, "*.parquet")))  # noqa: PTH118
    return Here([pattern for _, _, pattern in sorted(inputs)], models)


def _folders() -> Iterator[tuple[int, str, list[str]]]:
    """(depth, folder, its files), breadth first."""
    level, num_seen = [""], 0
    for depth in range(_MAX_DEPTH + 1):
        below = []
        for folder in level:
            files: list[str] = []
            folders: list[str] = []
            try:
                with os.scandir(folder or ".") as entries:
                    for entry in entries:
                        num_seen += 1
                        if num_seen > _MAX_ENTRIES:
                            return
                        if not entry.name.startswith((".", "__")):
                            kept = folders if entry.is_dir() else files
                            kept.append(entry.name)
                        if entry.name == layout.META:
                            folders = files = []
                            break
            except OSError:  # no right to look, or gone
                continue
            yield depth, folder, sorted(files)
            if "config.json" not in files:
                below += [os.path.join(folder, name) for name in sorted(folders)]  # noqa: PTH118
        level = below


@dataclass(frozen=True, slots=True)
class InputLook:
    """An input as one of its shards shows it. `values`: column -> its first values as text."""

    num_shards: int
    shard: Shard
    footer: Footer
    schema: pa.Schema
    values: dict[str, list[str]]

    def lines(self, width: int) -> Iterator[str]:
        """For people: how much there is, then a line for each column."""
        files = "1 file" if self.num_shards == 1 else f"{self.num_shards:,} files, the first"
        yield f"{files} with {self.footer.num_rows:,} rows"
        names = [name for name in self.values if name in self.schema.names]
        name_width = max((len(name) for name in names), default=0)
        types = {name: str(self.schema.field(name).type) for name in names}
        type_width = min(20, max(map(len, types.values()), default=0))
        for name in names:
            values = " | ".join(self.values[name])
            line = f"{printable(name):<{name_width}}  {types[name]:<{type_width}}  {values}"
            yield line if len(line) <= width else line[: width - 1] + "…"
        if num_more := len(self.schema.names) - len(names):
            yield f"and {num_more} more columns"

    def prompt_key(self, column: str) -> str:
        """The key of `prompt` that takes the column as it is. Raises InputError if none does."""
        if problem := column_problem(self.footer, column):
            raise InputError(problem)
        is_chat = any(value.startswith('[{"') and '"role"' in value for value in self.raw(column))
        keys = ("messages_column", "column") if is_chat else ("column", "messages_column")
        for key in (*keys, "token_ids_column"):
            try:
                check_type(PromptSettings.model_validate({key: column}), self.schema)
            except InputError:
                continue
            return key
        raise InputError(
            f"column {column!r} is {self.schema.field(column).type}: a prompt is made of text, of "
            "messages or of token ids"
        )

    def raw(self, column: str) -> list[str]:
        return self.values.get(column, [])

    def likely_prompt(self) -> str | None:
        """The column that most likely has the prompts: by its name, else the longest text."""
        fitting = [name for name in self.schema.names if self._can_be_prompt(name)]
        by_name = {name.lower(): name for name in reversed(fitting)}
        named = next((by_name[name] for name in _PROMPT_NAMES if name in by_name), None)
        lengths = {name: sum(map(len, self.values.get(name, ()))) for name in fitting}
        return named or max(lengths, key=lambda name: lengths[name], default=None)

    def _can_be_prompt(self, column: str) -> bool:
        try:
            return self.prompt_key(column) != "token_ids_column"
        except InputError:
            return False

    def likely_id(self, prompt: str | None) -> str | None:
        """A column that looks like the id of its row."""
        name: str
        for name in self.schema.names:
            is_named = name.lower() in ("id", "uid", "uuid", "key", "custom_id")
            kind = self.schema.field(name).type
            is_plain = pa.types.is_string(kind) or pa.types.is_integer(kind)
            if is_named and is_plain and name != prompt:
                return name
        return None


def look_at_input(settings: InputSettings) -> InputLook:
    """Raises InputError for an input without files or with one that cannot be read."""
    shards = list_input(settings, lambda: False)
    footer = None
    for shard in shards:
        footer = read_footer(shard)
        if footer.num_rows:
            break
    assert footer is not None  # there is no input without files
    names = dict.fromkeys([*footer.schema.names, *footer.partitions])
    usable = [name for name in names if column_problem(footer, name) is None]
    with ShardReader(shard, usable[:_MAX_SHOWN_COLUMNS]) as reader:
        schema = reader.schema
        block = next(iter(reader.blocks(0, min(reader.num_rows, _NUM_VALUES))), None)
    values: dict[str, list[str]] = {}
    for name in schema.names:
        column = block.table.column(name) if block is not None else ()
        values[name] = [_shown(value) for value in column]
    more = (footer.schema.field(n) for n in usable[len(schema) :] if n not in footer.partitions)
    return InputLook(len(shards), shard, footer, pa.schema([*schema, *more]), values)


def _shown(value: pa.Scalar) -> str:
    """On one line, whatever it is."""
    try:
        text = str(value.as_py())
    except (ValueError, OverflowError, pa.ArrowException):  # a time that Python does not have
        text = "?"
    return printable(" ".join(text[:500].split()))
