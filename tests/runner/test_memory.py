"""Memory depends on neither the size of a shard, nor of the input, nor the number of shards.

Peaks are the process's own (VmHWM), on the fake engine, as growth over a run on a small input.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import Place, job, results, rows, run, start, wait, write_job
from tests.support.scoring import job_of_task

MIB = 1 << 20
#: What a run may hold of any input: pages of the input, chunks that are read, ready and in flight,
#: results that wait for storage, and tables being written.
MAX_GROWTH_BYTES = 250 * MIB
_ALPHABET = np.frombuffer(
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", np.uint8
)


def peak_bytes(path: Path, timeout_s: float = 250) -> int:
    """Run the job to its end; the most memory its process had at a time.

    Polled: ru_maxrss of a child starts at what its parent had when it forked.
    """
    process = start(path, fake={"max_num_seqs": 64}, is_fresh=True)
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    deadline_s = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, StopIteration):
            lines = status.read_text().splitlines()
            high = next(line for line in lines if line.startswith("VmHWM"))
            peak = max(peak, int(high.split()[1]) * 1024)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.03)
    ended = wait(process, 1)
    assert ended.code == 0, ended.stderr
    return peak


def write_large_rows(path: Path, *, num_rows: int, row_bytes: int, num_groups: int) -> None:
    """Rows with a short text and `row_bytes` of payload that hardly compresses.

    The payloads repeat after 1,000 rows, which is too far apart for a compressor to notice.
    """
    batch_rows = 1_000
    letters = _ALPHABET[np.random.default_rng(0).integers(0, 64, batch_rows * row_bytes, np.uint8)]
    offsets = np.arange(0, batch_rows * row_bytes + 1, row_bytes, dtype=np.int32)
    payload = pa.StringArray.from_buffers(batch_rows, pa.py_buffer(offsets), pa.py_buffer(letters))
    table = pa.table(
        {
            "id": [f"row-{n}" for n in range(num_rows)],
            "text": [f"{n} word word" for n in range(num_rows)],
            "payload": pa.chunked_array([payload] * (num_rows // batch_rows)),
        }
    )
    path.parent.mkdir(parents=True)
    pq.write_table(table, path, use_dictionary=False, row_group_size=num_rows // num_groups)


@pytest.fixture
def small_peak(tmp_path: Path) -> int:
    """Peak of a run on a few rows: interpreter, libraries, threads."""
    place = Place(str(tmp_path / "small"))
    place.write_parquet("in/s0.parquet", rows(50))
    return peak_bytes(write_job(tmp_path, job(place), "small.yaml"))


@pytest.mark.parametrize("num_groups", [1, 8])
def test_a_shard_larger_than_the_allowance_is_folded_in_bounded_memory(
    folder: Place, tmp_path: Path, small_peak: int, num_groups: int
) -> None:
    num_rows, row_bytes = 20_000, 20_000
    path = Path(folder.url("in/s0.parquet"))
    write_large_rows(path, num_rows=num_rows, row_bytes=row_bytes, num_groups=num_groups)
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == num_groups
    assert path.stat().st_size > 1.2 * MAX_GROWTH_BYTES
    settings = job(
        folder,
        input={"keep_columns": ["payload"]},
        packing={"window_rows": 16384},
        checkpoint={"every_rows": 512, "every_s": 5},
    )
    growth = peak_bytes(write_job(tmp_path, settings)) - small_peak
    finished = pq.ParquetFile(folder.url("out/s0.parquet"))
    assert finished.metadata.num_rows == num_rows
    payloads = finished.read(columns=["id", "payload"]).slice(12_345, 1)
    original = pq.read_table(path, columns=["id", "payload"]).slice(12_345, 1)
    assert payloads.to_pylist() == original.to_pylist()
    assert growth < MAX_GROWTH_BYTES


@pytest.mark.parametrize(("task", "many"), [("generate", 50_000), ("score", 25_000)])
def test_memory_does_not_grow_with_the_number_of_rows(
    folder: Place, tmp_path: Path, task: str, many: int
) -> None:
    peaks = []
    for name, num_rows in (("few", 5_000), ("many", many)):
        place = Place(folder.url(name))
        place.write_parquet("in/s0.parquet", rows(num_rows))
        settings = job_of_task(task, place)
        settings["packing"] = {"window_rows": 1024}
        settings["checkpoint"] = {"every_rows": 512, "every_s": 5}
        peaks.append(peak_bytes(write_job(tmp_path, settings, f"{name}.yaml")))
        assert results(place).height == num_rows
    assert peaks[1] - peaks[0] < 40 * MIB


def test_more_tiny_shards_than_files_may_be_open_become_as_many_files(
    folder: Place, tmp_path: Path
) -> None:
    num_shards, shard_rows = 1_100, 5
    template = Path(folder.url("in"))
    template.mkdir(parents=True)
    frame = rows(num_shards * shard_rows)
    for index in range(num_shards):
        shard = frame.slice(index * shard_rows, shard_rows)
        shard.write_parquet(template / f"part-{index:05d}.parquet")
    settings = job(folder, checkpoint={"every_rows": 512, "every_s": 15})
    ended = run(write_job(tmp_path, settings), timeout_s=250)
    assert ended.code == 0, ended.stderr
    assert ended.result["rows"] == num_shards * shard_rows
    written = {p.name for p in Path(folder.url("out")).glob("*.parquet")}
    assert written == {p.name for p in template.iterdir()}
    assert results(folder)["id"].to_list() == frame["id"].to_list()
