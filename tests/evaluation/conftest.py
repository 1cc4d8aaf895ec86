"""Evaluations on the fake engine, in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from batchinfer.engine.kinds import KINDS
from batchinfer.prompt import encode
from batchinfer.testing import FakePlan, LightTokenizer
from tests.support.fake_run import fake_kinds

Fake = Callable[..., Any]


@contextmanager
def on_fake(**plan: Any) -> Iterator[None]:
    """What names vLLM, or no engine, runs on the fake."""
    with (
        mock.patch.object(encode, "_load", lambda path, **_: LightTokenizer(path)),
        mock.patch.dict(KINDS, fake_kinds(FakePlan(**plan))),
    ):
        yield


@pytest.fixture
def fake() -> Iterator[None]:
    with on_fake():
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten\n" * 12, encoding="utf-8")
    return path
