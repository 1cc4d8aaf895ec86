"""Limits that a process is started with (`ulimit`) are named, with what lifts them."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer import limits
from batchinfer.errors import ConfigError, TransientError
from batchinfer.runner.shortage import shortages
from batchinfer.storage.local_errors import os_errors
from tests.support.jobs import ROOT, Ended, Place, job, rows, write_job


def run_limited(limit: str, path: Path, module: str) -> Ended:
    shell = f'ulimit {limit}; exec "$0" -m {module} run "$1"'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = Place(str(tmp_path))
    place.write_parquet("in/a.parquet", rows(3))
    return write_job(tmp_path, job(place))


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-v 100000", "(`ulimit -v`) is 97.7 MiB"),  # numpy's import would never end
        ("-v 600000", "(`ulimit -v`) is 585.9 MiB"),
        ("-d 100000", "(`ulimit -d`) is 97.7 MiB"),
        ("-n 20", "(`ulimit -n`) is 20"),
        ("-f 1", "(`ulimit -f`) is 1,024 bytes"),
        ("-v 1500000", "(`ulimit -v`) is 1.4 GiB"),  # vLLM would abort in C++
        ("-n 50", "(`ulimit -n`) is 50"),  # gloo could not resolve 127.0.0.1
    ],
)
def test_a_limit_that_is_too_low_is_named(limit: str, words: str, path: Path) -> None:
    ended = run_limited(limit, path, "batchinfer")
    assert ended.code == ended.result["exit_code"] == 2, ended
    assert words in ended.result["message"]
    assert f"`ulimit {limit.split()[0]}" in ended.result["message"].partition(words)[2]
    assert "Traceback" not in ended.stderr


def test_as_many_files_are_open_as_may_be(path: Path) -> None:
    """The soft limit is for programs of `select`; a process may raise it to the hard one."""
    ended = run_limited("-Sn 20", path, "tests.support.fake_run")
    assert json.loads(ended.stdout)["status"] == "complete", ended.stderr


def limited(monkeypatch: pytest.MonkeyPatch, kind: int, soft: int) -> None:
    real = resource.getrlimit
    monkeypatch.setattr(
        resource, "getrlimit", lambda number: (soft, soft) if number == kind else real(number)
    )


def test_threads_that_others_of_the_user_have_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(limits, "_num_threads_of_user", lambda: 190)
    limited(monkeypatch, resource.RLIMIT_NPROC, 200)
    found = limits.shortage(num_threads=24)
    assert found is not None and found.may_pass
    assert "(`ulimit -u`) is 200, 190 of them in use" in found.text
    limited(monkeypatch, resource.RLIMIT_NPROC, 20)
    found = limits.shortage(num_threads=24)
    assert found is not None and not found.may_pass
    limited(monkeypatch, resource.RLIMIT_NPROC, 4000)
    assert limits.shortage(num_threads=24) is None


def test_what_is_met_later_names_the_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that cannot be started is a matter of memory where that is limited."""
    limited(monkeypatch, resource.RLIMIT_AS, 1 << 20)
    for error in (MemoryError(), RuntimeError("can't start new thread")):
        with pytest.raises(TransientError, match=r"`ulimit -v`\) is 1\.0 MiB"), shortages():
            raise error
    limited(monkeypatch, resource.RLIMIT_NOFILE, 64)
    with pytest.raises(TransientError, match=r"`ulimit -n`\) is 64"), os_errors("read", "x"):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    limited(monkeypatch, resource.RLIMIT_FSIZE, 1 << 30)
    with pytest.raises(ConfigError, match=r"`ulimit -f`\) is 1\.0 GiB"), os_errors("write", "x"):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
