"""The two ends of an S3 object as Python files: ranged reads, and a multipart upload in parts.

Must not know: how a request is made or retried; both get functions for that. Invariant: the memory
held is one part (writing) or one read-ahead block (reading), whatever the object's size.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MIN_PART_BYTES = 16 * 1024 * 1024

FIRST_READ_BYTES = 64 * 1024
MAX_READ_AHEAD_BYTES = 4 * 1024 * 1024
MAX_RANGE_BYTES = 16 * 1024 * 1024  # a longer read is cut, so that a lost connection costs one cut


def part_bytes(num_parts_before: int) -> int:
    """16 MiB, doubled every 1000 parts: 10,000 of them hold 16 TiB, and S3 ends at 5."""
    return MIN_PART_BYTES << (num_parts_before // 1000)


class RangeReader(io.BufferedIOBase):
    """Seekable. A jump fetches little more than is asked for, reading on fetches ever more ahead.

    `fetch(start, stop)` returns exactly those bytes. So Parquet's footer and a lone column chunk
    cost one request of their own size, a file read in small steps one request for each 4 MiB.
    """

    def __init__(self, size_bytes: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size_bytes = size_bytes
        self._fetch = fetch
        self._position = 0
        self._block = b""
        self._block_start = 0
        self._read_ahead_bytes = FIRST_READ_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        if origin[whence] + offset < 0:
            raise ValueError(f"seek to {origin[whence] + offset}, before the start of the file")
        self._position = origin[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        if self.closed:
            raise ValueError("read of a closed file")
        end = self._size_bytes
        if size is not None and size >= 0:
            end = min(end, self._position + size)
        pieces = []
        while self._position < end:
            piece = self._from_block(end) or self._fetched(end)
            self._position += len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size)

    def _from_block(self, end: int) -> bytes:
        offset = self._position - self._block_start
        return self._block[offset : offset + end - self._position] if offset >= 0 else b""

    def _fetched(self, end: int) -> bytes:
        start = self._position
        is_sequential = start == self._block_start + len(self._block)
        if is_sequential:
            self._read_ahead_bytes = min(self._read_ahead_bytes * 4, MAX_READ_AHEAD_BYTES)
        else:
            self._read_ahead_bytes = FIRST_READ_BYTES
        wanted = min(end - start, MAX_RANGE_BYTES)
        stop = min(start + max(wanted, self._read_ahead_bytes), self._size_bytes)
        content = self._fetch(start, stop)
        # A long read is handed on whole; keeping it as well would double the memory.
        self._block = content if stop - start <= MAX_READ_AHEAD_BYTES else b""
        self._block_start = start if self._block else stop
        return content[:wanted]


class PartWriter(io.BufferedIOBase):
    """Collects parts of growing size and hands each to `upload` once it is full.

    What is left at the end is in `rest`: the last part, or the whole file if it fits in one.
    """

    def __init__(self, upload: Callable[[int, bytes], None]) -> None:
        self._upload = upload
        self._num_bytes = 0
        self.num_parts = 0
        self.rest = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._num_bytes

    def write(self, content: ReadableBuffer, /) -> int:
        with memoryview(content) as view, view.cast("B") as left:
            num_written = len(left)
            offset = 0
            while offset < num_written:
                # A full part waits for the byte after it, so that a file of one part is one PUT.
                if len(self.rest) == part_bytes(self.num_parts):
                    self.flush_part()
                room = part_bytes(self.num_parts) - len(self.rest)
                self.rest += left[offset : offset + room]
                offset += room
        self._num_bytes += num_written
        return num_written

    def flush_part(self) -> None:
        part = bytes(self.rest)
        self.rest = bytearray()
        self.num_parts += 1
        self._upload(self.num_parts, part)
