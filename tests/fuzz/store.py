"""Whether Arrow can write a table to Parquet and read it back, asked of a process of its own.

Arrow ends its process on some tables (a failed check, a division by zero). Such a table could not
be somebody's file, and must not take the fuzzer with it.
"""

from __future__ import annotations

import atexit
import pickle
import struct
import subprocess
import sys
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.jobs import ROOT

_HEADER = struct.Struct("<QQ")
_YES, _NO = b"1", b"0"


class _Prober:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._end)

    def can_store(self, table: pa.Table, group_rows: int) -> bool:
        sent = pickle.dumps(table, protocol=5)  # Arrow's own format loses buffers of views
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(_HEADER.pack(group_rows, len(sent)))
            process.stdin.write(sent)
            process.stdin.flush()
            answer = process.stdout.read(1)
        except BrokenPipeError:
            answer = b""
        if not answer:  # it was ended by this table
            self._end()
        return answer == _YES

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(30)


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.store"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )


can_store = _Prober().can_store


def _store(table: pa.Table, group_rows: int) -> bool:
    try:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=group_rows)
        file = pq.ParquetFile(pa.BufferReader(sink.getvalue()))
        for index in range(file.num_row_groups):
            file.read_row_group(index)
        return True
    except (pa.ArrowException, OSError, UnicodeError):
        return False


def main(asked: IO[bytes], answers: IO[bytes]) -> None:
    while header := asked.read(_HEADER.size):
        group_rows, num_bytes = _HEADER.unpack(header)
        table = pickle.loads(asked.read(num_bytes))
        answers.write(_YES if _store(table, group_rows) else _NO)
        answers.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
