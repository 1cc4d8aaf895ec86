"""What tests share: nothing of the machine's own settings, and places for inputs and outputs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest

from tests.support.jobs import MODEL, Place
from tests.support.s3_server import S3Server, s3_server

# A machine that others use too is no reason to fail: time is measured in benchmarks.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="skip every test that starts a process (make test-fast)"
    )


@pytest.fixture(autouse=True)
def _no_process_if_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test cannot forget to say that it starts whole runs: it is skipped when it tries to."""
    if request.config.getoption("--fast"):
        monkeypatch.setattr(subprocess, "Popen", _SkippingPopen)


class _SkippingPopen(subprocess.Popen[Any]):
    def __init__(self, *_: Any, **__: Any) -> None:
        _skip()


def _skip() -> NoReturn:
    pytest.skip("starts a process")


@pytest.fixture(autouse=True)
def _no_foreign_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("BATCHINFER_", "AWS_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    """One S3 server over HTTP for all tests; each takes a bucket of its own."""
    with s3_server() as running:
        yield running


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a test's files are: a folder, and once more a bucket."""
    if request.param == "local":
        return Place(str(tmp_path / "data"))
    server: S3Server = request.getfixturevalue("server")
    return Place(f"s3://{server.create_bucket()}", server.environment())


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    """A local place, for what does not depend on the store."""
    return Place(str(tmp_path / "data"))


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, as one GGUF file. To be read only."""
    from tests.support.gguf import make_gguf

    file = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    make_gguf(MODEL, file)
    return file
