"""`batchinfer serve`: its first line and its last, signals, and what it never leaves behind.

On a server without a model; the real one is in tests/end_to_end/test_serve.py.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchinfer.cli.serving import api_key_of, warn_of_openness
from batchinfer.errors import ConfigError
from batchinfer.serving import Address, bind
from tests.support.jobs import Ended, Place, Process, job, kill, start, wait, wait_until, write_job

KEY = "sk-never-shown"
Start = Callable[..., Process]


@pytest.fixture
def path(folder: Place, tmp_path: Path) -> Path:
    return write_job(tmp_path, job(folder))


@pytest.fixture
def serve(path: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server on a free port; FAKE_SERVER's settings by name. Temporary files are in `tmp`
    of the test's folder.
    """
    (tmp_path / "tmp").mkdir()
    started = []

    def started_with(*arguments: str, **settings: Any) -> Process:
        environ = {"FAKE_SERVER": json.dumps(settings), "TMPDIR": str(tmp_path / "tmp"), "K": KEY}
        port = () if "--port" in arguments else ("--port", "0")
        process = start(path, *port, *arguments, command=("serve",), environ=environ)
        started.append(process)
        return process

    yield started_with
    for process in started:
        kill(process)
        process.communicate()


def url_of(process: Process) -> str:
    """Of a server, from its first line: host and port."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving test at http://127.0.0.1:"), line
    return line.split("//")[1].removesuffix("/v1\n")


def asked(address: str, method: str = "GET", path: str = "/health") -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    finally:
        connection.close()


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def assert_refused(ended: Ended, code: int, message: str) -> None:
    assert ended.code == code, ended.stderr
    assert len(ended.stdout.splitlines()) == 1, "only the last line"
    assert ended.result == {
        "status": "failed",
        "exit_code": code,
        "url": "",
        "warnings": [],
        "message": ended.result["message"],
    }
    assert message in ended.result["message"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_requests_in_flight_end(
    serve: Start, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """To the whole group, as a terminal and schedulers send it."""
    process = serve(answer_s=1.5)
    address = url_of(process)
    statuses: list[int] = []
    asking = threading.Thread(
        target=lambda: statuses.append(asked(address, "POST", "/v1/completions"))
    )
    asking.start()
    time.sleep(0.5)
    kill(process, number)
    ended = wait(process, 60)
    asking.join()
    assert statuses == [200]
    assert ended.code == code, ended.stderr
    assert ended.result == {
        "status": "stopped",
        "exit_code": code,
        "url": f"http://{address}",
        "warnings": [],
        "message": f"received {number.name}",
    }
    assert not list((tmp_path / "tmp").iterdir()), "log and all are gone"


def test_a_second_signal_ends_it_immediately(serve: Start) -> None:
    process = serve(is_deaf=True)
    url_of(process)
    own = descendants(process.pid)
    assert len(own) == 2, "the server and its engine"
    kill(process, signal.SIGTERM)
    time.sleep(1)
    sent_s = time.monotonic()
    kill(process, signal.SIGTERM)
    ended = wait(process, 60)
    assert time.monotonic() - sent_s < 10, "not after the time that requests have"
    assert ended.code == 143 and "received SIGTERM as well" in ended.result["message"]
    wait_until(lambda: not any(map(is_alive, own)), what="the end of all processes")


def test_a_signal_while_the_model_loads_ends_it_immediately(serve: Start, tmp_path: Path) -> None:
    process = serve(load_s=60)
    wait_until(lambda: list((tmp_path / "tmp").glob("*/server.log")), what="the server's log")
    kill(process, signal.SIGTERM)
    ended = wait(process, 30)
    assert ended.code == 143
    assert ended.stdout.count("\n") == 1 and ended.result["url"] == ""


def test_nothing_outlives_a_kill(serve: Start) -> None:
    process = serve()
    address = url_of(process)
    own = descendants(process.pid)
    assert len(own) == 2, "the server and its engine"
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, own)), what="the end of all processes")
    with pytest.raises(ConnectionError):  # reset, while the kernel still takes the socket apart
        asked(address)


def test_a_server_that_is_killed_is_a_reason_to_start_again(serve: Start, tmp_path: Path) -> None:
    process = serve()
    address = url_of(process)
    own = descendants(process.pid)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        asked(address, "POST", "/die")
    ended = wait(process, 60)
    assert ended.code == 75, ended.stderr
    assert ended.result["message"].startswith("the server's process is gone (ended by SIGKILL)")
    assert ended.result["url"] == f"http://{address}"
    wait_until(lambda: not any(map(is_alive, own)), what="the end of all processes")
    (log,) = (tmp_path / "tmp").glob("*/server.log")
    assert f"the server's log is {log}" in ended.stderr
    assert "the engine's own words" in log.read_text()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (["MemoryHeld", "others hold it"], 75, "others hold it"),
        (["RuntimeError", "odd"], 1, "internal error: RuntimeError: odd"),
    ],
)
def test_a_server_reports_its_failure_as_a_run_does(
    serve: Start, error: list[str], code: int, message: str
) -> None:
    assert_refused(wait(serve(error=error)), code, message)


def test_a_port_in_use_is_reported_before_the_model_loads(serve: Start) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        ended = wait(serve("--port", port, error=["RuntimeError", "too late"]))
    assert_refused(ended, 75, f"port {port} of 127.0.0.1 is in use by another process: end that")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "model.path=/no/such"), "model.path: there is no folder"),
        (("--port", "http"), "'http' is not a valid integer"),
    ],
)
def test_a_start_that_cannot_be_has_a_last_line_too(
    serve: Start, arguments: tuple[str, ...], message: str
) -> None:
    assert_refused(wait(serve(*arguments)), 2, message)


@pytest.mark.parametrize("key", ["", " secret ", "ключ", "two\nlines"])
def test_a_key_that_no_client_could_send_is_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K", key)
    with pytest.raises(ConfigError, match="--api-key-env K: ") as refused:
        api_key_of("K")
    assert not key or key.strip() not in str(refused.value)
    monkeypatch.delenv("K")
    with pytest.raises(ConfigError, match="--api-key-env K: that environment variable is not set"):
        api_key_of("K")


def test_a_key_is_on_no_command_line_and_in_no_log(serve: Start, tmp_path: Path) -> None:
    """With --debug, too, which says most."""
    process = serve("--api-key-env", "K", "--debug")
    url_of(process)
    for pid in (process.pid, *descendants(process.pid)):
        assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    files = [file for file in (tmp_path / "tmp").rglob("*") if file.is_file()]
    assert any(file.name == "server.log" for file in files)
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    kill(process, signal.SIGTERM)
    ended = wait(process, 60)
    assert KEY not in ended.stderr and KEY not in ended.stdout
    assert "the engine's own words" in ended.stderr, "as of every command with --debug"


def test_a_model_for_everybody_is_warned_of(serve: Start) -> None:
    process = serve("--host", "0.0.0.0")
    url_of(process)
    kill(process, signal.SIGTERM)
    ended = wait(process, 60)
    text = "--host 0.0.0.0 without --api-key-env: whoever reaches this machine can use the model"
    assert ended.result["warnings"] == [text]
    assert f"warning {text}" in ended.stderr


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", KEY), ("127.0.0.1", None), ("::1", None)])
def test_a_model_for_few_is_not_warned_of(
    host: str, key: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_openness(Address(host, 8000), key)
    assert not caplog.records


def test_input_and_output_are_left_alone_which_is_reported_once(
    serve: Start, folder: Place
) -> None:
    process = serve()
    url_of(process)
    kill(process, signal.SIGTERM)
    ended = wait(process, 60)
    said = "not for a server, ignored: input, prompt.template, sampling.logprobs, packing, "
    assert ended.stderr.count(f"{said}checkpoint, output\n") == 1
    assert not Path(folder.root).exists()
