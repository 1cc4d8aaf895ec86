"""The texts that models are measured on, by name or from files, in pieces.

Must not know: tokenizers, models. Whatever they come from, the pieces joined with `separator` are
the text. Files of text are read as they are; of Parquet, each row is a piece, and one that is null
or only white space is not a paragraph of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batchinfer.errors import ConfigError, InputError
from batchinfer.source import Block, Shard, ShardReader, list_shards
from batchinfer.storage import is_s3, local_path, open_store
from batchinfer.storage.hub import hub_files
from batchinfer.storage.local_errors import os_errors

_HERE = Path(__file__).parent / "data"
#: Name -> (Parquet file, column, what is between two rows).
NAMED = {"wikitext2": (_HERE / "wikitext-2-test.parquet", "text", "\n")}
#: Between rows of other Parquet files: a paragraph each.
PARAGRAPH = "\n\n"
_PIECE_CHARS = 1 << 20
_HUB = "hub:"
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:/([\w.-]+))?")


@dataclass(frozen=True, slots=True)
class Text:
    """`path`: a file of text, or Parquet: a file, folder or glob, local or on S3."""

    name: str
    path: str
    column: str | None
    separator: str

    def is_left_out(self, piece: str) -> bool:
        """Whether `piece` is not part of the text: a blank row between paragraphs."""
        return self.separator == PARAGRAPH and not piece.strip()

    def pieces(self) -> Iterator[str]:
        """With those that are left out. Raises ConfigError, InputError."""
        return self._of_file() if self.column is None else self._rows(self.column)

    def refuse_blank(self) -> None:
        """Raises InputError for a text without words, ConfigError for one that cannot be read."""
        if not any(piece.strip() for piece in self.pieces()):
            raise empty(self)

    def _of_file(self) -> Iterator[str]:
        path = local_path(self.path)
        try:
            with os_errors("read", path), path.open(encoding="utf-8-sig", newline="") as file:
                while piece := file.read(_PIECE_CHARS):
                    yield piece
        except UnicodeDecodeError:
            raise InputError(
                f"{path} is not UTF-8 text: convert it, for example with iconv"
            ) from None

    def shards(self) -> list[Shard]:
        """The Parquet files. Raises InputError in the words of who named the data."""
        try:
            return list_shards([self.path], open_store)
        except InputError as error:
            raise InputError(str(error).replace("input.path", "the data")) from None

    def _rows(self, column: str) -> Iterator[str]:
        for shard in self.shards():
            yield from _rows_of(shard, column)


def empty(text: Text) -> InputError:
    return InputError(
        f"the text of {text.name} is empty, or only white space: there is nothing to measure on"
    )


def text_of(data: str, column: str | None = None) -> Text:
    """`data`: a name, a path, or hub:ORG/NAME[/CONFIG[/SPLIT]]. Raises ConfigError."""
    if data in NAMED:
        path, own_column, separator = NAMED[data]
        if column is not None and column != own_column:
            raise ConfigError(f"the data {data} has one column: leave column {column!r} out")
        return Text(data, str(path), own_column, separator)
    if data.startswith(_HUB):
        return Text(data, str(_download(data)), column or "text", PARAGRAPH)
    is_parquet = is_s3(data) or "*" in data or data.endswith(".parquet")
    if not is_parquet:
        path = local_path(data)
        with os_errors("look at", path):
            is_parquet = path.is_dir()
            if not path.exists():
                raise ConfigError(
                    f"the data {data}: there is no such file, and no such name "
                    f"({', '.join(NAMED)}; of the hub: hub:ORG/NAME/CONFIG/SPLIT)"
                )
    if is_parquet and column is None:
        raise ConfigError(f"the data {data} is Parquet: name the column with the text")
    if not is_parquet and column is not None:
        raise ConfigError(f"the data {data} is a file of text: leave column {column!r} out")
    return Text(data, data, column, PARAGRAPH if is_parquet else "")


def _rows_of(shard: Shard, column: str) -> Iterator[str]:
    """Null is an empty row."""
    with ShardReader(shard, [column]) as reader:
        kind = str(reader.schema.field(0).type)
        if kind not in ("string", "large_string"):
            raise InputError(f"{shard.url}: column {column!r} is {kind}, not text")
        for block in reader.blocks(0, reader.num_rows):
            yield from (text or "" for text in valid_texts(block, shard, column))


def valid_texts(block: Block, shard: Shard, column: str) -> list[str | None]:
    """A block's only column, of text. Raises InputError where it is not UTF-8."""
    try:
        found: list[str | None] = block.table.column(0).to_pylist()
    except UnicodeDecodeError:
        raise InputError(
            f"{shard.url}, rows {block.rows[0]} to {block.rows[-1]}: column {column!r} has text "
            "that is not UTF-8: write the file with converted text"
        ) from None
    return found


def _download(data: str) -> Path:
    """The folder of a hub data set's Parquet files, of which the hub keeps a branch."""
    match = _HUB_NAME.fullmatch(data)
    if match is None:
        raise ConfigError(f"the data {data}: write hub:ORG/NAME, hub:ORG/NAME/CONFIG/SPLIT")
    name, config, split = match[1], match[2] or "default", match[3] or "test"
    branch = "refs/convert/parquet"
    found = hub_files(
        f"the data {data}",
        name,
        [f"{config}/{split}/*.parquet"],
        revision=branch,
        repo_type="dataset",
    )
    folder = found / config / split
    if not folder.is_dir():
        raise ConfigError(
            f"the data {data} has no {config}/{split} on the hub's branch {branch}: look there for "
            "its configurations and splits"
        )
    return folder
