"""A text's token stream, and the windows in which a model is measured on it.

Window k is the tokens from k * stride on, at most `context` of them, and scores those that no
earlier window has. So each token is scored once, with at least context - stride tokens before it,
except in the first window, where it has all that precede it. The first token of the stream has
nothing before it and is not scored. Only the stream begins with the special tokens that the
tokenizer puts before a text; windows do not.

Must not know: models, engines. Invariant: equal windows are equal bytes in the Parquet file, whose
name follows from them, so whoever makes them again finds what was computed of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import InputError
from batchinfer.evaluation.texts import Text, empty
from batchinfer.prompt.encode import TokenEncoder
from batchinfer.storage.local_errors import os_errors

logger = logging.getLogger("batchinfer.evaluation")

#: Columns of the windows' file.
ID, GIVEN, SCORED, NUM_BYTES = "window", "given_token_ids", "scored_token_ids", "num_bytes"

_CHARS_PER_TOKEN = 8  # more than most texts have
_MARGIN_TOKENS = 256  # a cut text's last tokens may be others than the whole one's
#: The tokenizer takes about 300 bytes of memory for each token of a text.
_MAX_CHARS = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TokenStream:
    """`ends`: bytes of the text (UTF-8) up to the end of each token; they never decrease."""

    token_ids: npt.NDArray[np.int32]  # [n]
    ends: npt.NDArray[np.int64]  # [n]


@dataclass(frozen=True, slots=True)
class TextWindows:
    """`table`: a row each."""

    table: pa.Table
    digest: str  # sha256 of their token ids
    num_windows: int
    num_tokens: int  # scored
    num_bytes: int  # of the text of those
    max_token_id: int

    @property
    def name(self) -> str:
        """Of their Parquet file."""
        return f"{self.digest[:16]}.parquet"

    def write(self, folder: Path) -> None:
        """Write them into `folder`, as a whole; what is there stays."""
        path = folder / self.name
        with os_errors("write", path):
            if path.exists():
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            pq.write_table(self.table, temporary)
            temporary.replace(path)


def stream_of(text: Text, encoder: TokenEncoder, max_tokens: int | None) -> TokenStream:
    """The text's tokens, the first `max_tokens` of them. Reads no more of it than they need.

    Raises InputError for a text without tokens, or one that is too long.
    """
    want_tokens = None if max_tokens is None else max_tokens + _MARGIN_TOKENS
    want_chars = _MAX_CHARS
    if want_tokens is not None:
        want_chars = min(want_chars, _CHARS_PER_TOKEN * want_tokens)
    reader = _Reader(text)
    while True:
        is_exhausted = reader.reads(want_chars)
        whole = text.separator.join(reader.read)
        is_all = is_exhausted and len(whole) <= want_chars
        if is_all and not whole.strip():
            raise empty(text)
        stream = _encode(whole[:want_chars], encoder)
        if is_all or (want_tokens is not None and len(stream.token_ids) >= want_tokens):
            reader.warn()
            return TokenStream(stream.token_ids[:max_tokens], stream.ends[:max_tokens])
        if want_chars >= _MAX_CHARS:
            raise InputError(
                f"{text.name} has more than {_MAX_CHARS:,} characters: measure on its first "
                "windows (max_rows), or on a part of it"
            )
        want_chars = min(2 * want_chars, _MAX_CHARS)


class _Reader:
    """The pieces of a text, read as far as they are wanted."""

    def __init__(self, text: Text) -> None:
        self.read: list[str] = []
        self._text = text
        self._pieces = text.pieces()
        self._num_chars = 0
        self._num_left_out = 0

    def reads(self, want_chars: int) -> bool:
        """Read until there are `want_chars` characters; whether that was all."""
        while self._num_chars < want_chars:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            if self._text.is_left_out(piece):
                self._num_left_out += 1
                continue
            self.read.append(piece)
            self._num_chars += len(piece)
        return False

    def warn(self) -> None:
        if self._num_left_out:
            logger.warning(
                "the data %s: %s of %s rows that were read have no text (null, empty or white "
                "space) and are not part of what is measured",
                self._text.name,
                f"{self._num_left_out:,}",
                f"{self._num_left_out + len(self.read):,}",
            )


def _encode(text: str, encoder: TokenEncoder) -> TokenStream:
    bare = encoder.encode([text], add_special_tokens=False)[0]
    (spans,) = encoder.spans([text])
    before, _ = encoder.affixes
    if bare[: len(before)].tolist() == before:
        before = []  # the text brings them itself
    lengths = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    num_bytes = 1 + sum((lengths >= least).astype(np.int64) for least in (0x80, 0x800, 0x10000))
    up_to = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_bytes)])
    ends = np.maximum.accumulate(up_to[spans[:, 1]]) if len(spans) else np.empty(0, np.int64)
    return TokenStream(
        np.concatenate([np.array(before, np.int32), bare]),
        np.concatenate([np.zeros(len(before), np.int64), ends]),
    )


def windows_of(stream: TokenStream, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored token, stop) of each window, as positions in the stream."""
    num_tokens = len(stream.token_ids)
    start, scored = 0, 1
    while scored < num_tokens:
        stop = min(start + context, num_tokens)
        yield start, scored, stop
        start, scored = start + stride, stop


def num_tokens_of(num_windows: int, context: int, stride: int) -> int:
    """Tokens of a stream that the first `num_windows` windows take."""
    return context + (num_windows - 1) * stride


def make_windows(stream: TokenStream, context: int, stride: int) -> TextWindows:
    """Raises InputError if there is none.

    The caller sees to it that 1 <= stride < context.
    """
    bounds = np.array(list(windows_of(stream, context, stride)), np.int64).reshape(-1, 3)
    if not len(bounds):
        raise InputError(
            f"the text has {len(stream.token_ids)} token: at least 2 are needed, as nothing comes "
            "before the first"
        )
    ids, ends = stream.token_ids, stream.ends
    given = [ids[start:scored] for start, scored, _ in bounds]
    scored = [ids[first:stop] for _, first, stop in bounds]
    num_bytes = ends[bounds[:, 2] - 1] - ends[bounds[:, 1] - 1]
    digest = hashlib.sha256()
    for arrays in zip(given, scored, strict=True):
        for array in arrays:
            digest.update(len(array).to_bytes(4, "little") + array.astype("<i4").tobytes())
    table = pa.table(
        {
            ID: pa.array(np.arange(len(bounds), dtype=np.int32)),
            GIVEN: _lists(given),
            SCORED: _lists(scored),
            NUM_BYTES: pa.array(num_bytes),
        }
    )
    return TextWindows(
        table=table,
        digest=digest.hexdigest(),
        num_windows=len(bounds),
        num_tokens=int((bounds[:, 2] - bounds[:, 1]).sum()),
        num_bytes=int(num_bytes.sum()),
        max_token_id=int(ids.max()),
    )


def _lists(arrays: Iterable[npt.NDArray[np.int32]]) -> pa.ListArray:
    arrays = list(arrays)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(a) for a in arrays])])
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(np.concatenate(arrays))
    )
