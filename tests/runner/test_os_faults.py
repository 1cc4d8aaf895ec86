"""Whatever call to the file system fails with whatever errno: 0, 2 or 75, and the next start ends
with every row.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.support.in_process import run_here
from tests.support.jobs import Place, job, results, rows, write_job
from tests.support.os_faults import OsFaults

ERRNOS = [
    errno.EACCES,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.EINTR,
    errno.EINVAL,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOLCK,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ENOSYS,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.ENXIO,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
    errno.EXDEV,
]
SLOW = {"step_s": 0.005}


@pytest.fixture
def path(folder: Place, tmp_path: Path) -> Path:
    folder.write_parquet("in/a.parquet", rows(100))
    folder.write_parquet("in/b.parquet", rows(10))
    return write_job(tmp_path, job(folder, checkpoint={"every_rows": 16, "every_s": 0.01}))


def must_be_whole(folder: Place) -> None:
    assert results(folder)["row"].to_list() == [*range(100), *range(10)]


@pytest.mark.parametrize("number", ERRNOS, ids=lambda number: errno.errorcode[number])
def test_a_failing_call_is_not_reported_as_a_bug_and_the_next_start_finishes(
    folder: Place, path: Path, number: int
) -> None:
    """A call anywhere in the run, and in a second one all calls from there on."""
    chosen = random.Random(number)
    out = Path(folder.url("out"))
    for times in (1, 1_000_000):
        faults = OsFaults(out, at=chosen.randint(1, 400), number=number, times=times)
        with faults.installed():
            ended = run_here(path, fake=SLOW)
        assert ended.code in (0, 2, 75), (faults.failed[:1], ended)
        again = run_here(path)
        assert again.code == 0, (faults.failed[:1], ended, again)
        must_be_whole(folder)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("call", "number"),
    [("link", errno.EPERM), ("link", errno.EOPNOTSUPP), ("fsync", errno.EINVAL)],
)
def test_file_systems_without_hard_links_or_fsync_of_folders_will_do(
    folder: Place, path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    real = getattr(os, call)

    def refused(first: str | int, *rest: str) -> None:
        if call == "link" or Path(f"/proc/self/fd/{first}").is_dir():
            raise OSError(number, os.strerror(number))
        real(first, *rest)

    monkeypatch.setattr(os, call, refused)
    assert run_here(path, fake=SLOW).code == 0
    must_be_whole(folder)


@pytest.mark.parametrize("problem", [MemoryError(), RuntimeError("can't start new thread")])
def test_what_the_machine_does_not_give_is_a_reason_to_try_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise problem

    with monkeypatch.context() as patched:
        patched.setattr("batchinfer.runner.publishing.build_table", fail)
        ended = run_here(path)
    assert ended.code == 75, ended
    assert "start again" in ended.message
    assert run_here(path).code == 0
