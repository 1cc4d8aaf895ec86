"""The process of a server that does not end when it is told to."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from batchinfer.config import Job
from batchinfer.serving import Address, ServerOrder, ServerProcess, bind, prepare
from batchinfer.serving import process as process_module
from tests.support.jobs import Place, job


def test_a_server_that_ignores_its_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerProcess, "module", "tests.support.fake_server")
    monkeypatch.setattr(process_module, "_END_S", 0.5)
    monkeypatch.setenv("FAKE_SERVER", json.dumps({"is_deaf": True}))
    spec = prepare(Job.model_validate(job(Place(str(tmp_path))))).spec
    with bind("127.0.0.1", 0) as bound:
        order = ServerOrder(
            spec=spec,
            socket_fd=bound.fileno(),
            folder=str(tmp_path),
            parent_pid=os.getpid(),
            api_key="never shown",
            logs_requests=False,
            drain_s=0.5,
        )
        assert "never shown" not in repr(order)
        server = ServerProcess(order, Address.of(bound))
        try:
            server.wait_until_ready()
            sent_s = time.monotonic()
            assert server.drain() is None
            assert time.monotonic() - sent_s > 1.0
        finally:
            server.kill()
