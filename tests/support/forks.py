"""Starts of a command without its imports: a process that has imported them forks for each start.

    python -m tests.support.forks KIND DESCRIPTOR

Imports are nine tenths of what a small run computes. A fork is a process of its own all the same:
it has a session, environment, pipes and signals of its own, goes through the command line's own
entry, and is killed or ends by itself. What is read when a process begins cannot be given to a
fork: `fork` refuses such environments, and the caller starts a fresh interpreter.

The forking process runs nothing itself, so that each fork finds what an import leaves behind.
Processes that a fork starts in its turn may be forks too: see `tests.support.spares`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from tests.support.spares import forked, give_spares, run_python

ROOT = Path(__file__).resolve().parents[2]


def python_path() -> str:
    """PYTHONPATH for processes that import these tests from elsewhere."""
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))


#: Beginnings of variables that are read when a process begins or a library is imported.
_EARLY = (
    *("PYTHON", "LD_", "LANG", "LC_", "TZ", "HOME", "XDG_", "MALLOC_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMPY_", "CUDA_", "ATEN_", "ONEDNN_"),
    *(
        "TORCH_",
        "TORCHDYNAMO_",
        "VLLM_",
        "HF_",
        "HUGGINGFACE_",
        "TRANSFORMERS_",
        "TRITON_",
        "TOKENIZERS_",
    ),
)
#: The exceptions: read when an engine or a server is built, and where commands keep what they make.
_LATE = ("VLLM_CPU_", "VLLM_API_KEY", "XDG_CACHE_HOME")
#: The environment before a test changed it, without what this machine says of S3.
_ENVIRON = {
    **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
    **{"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"},
    "PYTHONPATH": python_path(),
}
_MAX_ORDER_BYTES = 1 << 17
_NUMBER_BYTES = 4


class Forked:
    """A fork that runs; what tests use of `subprocess.Popen`."""

    def __init__(self, told: int, streams: Sequence[IO[str] | None]) -> None:
        self._told = told  # arrive here: the process id, when it ended, its exit code
        self.stdout, self.stderr = streams
        self._read: dict[IO[str], list[bytes]] = {s: [] for s in streams if s is not None}
        self.returncode: int | None = None
        self.pid = self._number()

    def _number(self) -> int:
        content = os.read(self._told, _NUMBER_BYTES)
        if len(content) < _NUMBER_BYTES:
            raise RuntimeError("the process that forks is gone: see what it printed")
        return int.from_bytes(content, "little", signed=True)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = self._number()
            os.close(self._told)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it prints until both streams are closed, and its end. May be called again."""
        deadline_s = None if timeout is None else time.monotonic() + timeout
        open_streams = {stream for stream in self._read if not stream.closed}
        while open_streams:
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            ready, _, _ = select.select(open_streams, [], [], left_s)
            if not ready and deadline_s is not None and time.monotonic() >= deadline_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            for stream in ready:
                content = os.read(stream.fileno(), 1 << 16)
                self._read[stream].append(content)
                if not content:
                    stream.close()
                    open_streams.remove(stream)
        self.wait(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        return self._text(self.stdout), self._text(self.stderr)

    def _text(self, stream: IO[str] | None) -> str:
        return b"".join(self._read[stream]).decode() if stream is not None else ""


class Forks:
    """One process that has imported what `kind` (a key of `KINDS`) names, and forks."""

    def __init__(self, kind: str) -> None:
        self._early = _early(_ENVIRON)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # It ends when our end of the channel is closed, at the latest with our process.
        command = [sys.executable, "-m", "tests.support.forks", kind, str(theirs.fileno())]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    cwd=ROOT,
                    env=_ENVIRON,
                    start_new_session=True,
                )
        except BaseException:  # with --fast: the test that would start it is skipped
            self._channel.close()
            raise

    def can_give(self, environ: Mapping[str, str]) -> bool:
        """Whether a fork with this environment is as a fresh process with it."""
        return _early(environ) == self._early

    def fork(
        self,
        arguments: Sequence[str],
        environ: Mapping[str, str] = _ENVIRON,
        *,
        stdout: int | IO[Any] = subprocess.PIPE,
        ignored: Collection[int] = (),
        spares: Sequence[int] = (),
        is_python: bool = False,
    ) -> Forked:
        """Start the command line, or Python with these arguments.

        `ignored`: signals that the process ignores from its start. `spares`: of how many processes
        of Python that it starts itself the imports are saved; how many of one of those; and so on.
        """
        streams: list[IO[str] | None] = [None, None]
        told, theirs_told = os.pipe()
        theirs = [theirs_told]
        for n, asked in enumerate((stdout, subprocess.PIPE)):
            if asked == subprocess.PIPE:
                ours, end = os.pipe()
                streams[n] = os.fdopen(ours)
            else:
                end = os.dup(asked if isinstance(asked, int) else asked.fileno())
            theirs.append(end)
        order = {
            "arguments": list(arguments),
            "environ": dict(environ),
            "ignored": [*ignored],
            "spares": [*spares],
            "is_python": is_python,
        }
        socket.send_fds(self._channel, [json.dumps(order).encode()], theirs)
        for end in theirs:
            os.close(end)
        return Forked(told, streams)


_FORKS: dict[str, Forks] = {}


def forks(kind: str) -> Forks:
    """The one of this process, which is started when it is first asked for."""
    if kind not in _FORKS:
        _FORKS[kind] = Forks(kind)
    return _FORKS[kind]


def _early(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(_EARLY) and not name.startswith(_LATE)
    }


def _serve(channel: socket.socket, command: Callable[[], None]) -> Callable[[], None] | None:
    """Fork for each order that arrives. Returns in forks, with what to run, and in the end."""
    running: dict[int, tuple[int, int]] = {}  # its pidfd -> its id, and where its end is told
    ready = select.poll()
    ready.register(channel, select.POLLIN)
    while True:
        for descriptor, _ in ready.poll():
            if descriptor != channel.fileno():
                ready.unregister(descriptor)
                pid, told = running.pop(descriptor)
                _, status = os.waitpid(pid, 0)
                _tell(told, os.waitstatus_to_exitcode(status))
                os.close(told)
                os.close(descriptor)
                continue
            message, given, _, _ = socket.recv_fds(channel, _MAX_ORDER_BYTES, 3)
            if not message:
                return None
            told, stdout, stderr = given
            pid = forked()
            if pid == 0:
                for inherited in (*running, *(told for _, told in running.values())):
                    os.close(inherited)
                channel.close()
                order = json.loads(message)
                _begin(order, told, stdout, stderr)
                return partial(run_python, order["arguments"]) if order["is_python"] else command
            os.close(stdout)
            os.close(stderr)
            descriptor = os.pidfd_open(pid)
            running[descriptor] = pid, told
            ready.register(descriptor, select.POLLIN)


def _tell(told: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(told, number.to_bytes(_NUMBER_BYTES, "little", signed=True))


def _begin(order: Mapping[str, Any], told: int, stdout: int, stderr: int) -> None:
    """Become what was ordered, as far as a fresh process would be before its first import."""
    os.setsid()
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for ours, target in ((stdout, 1), (stderr, 2)):
        os.dup2(ours, target)
        os.close(ours)
    sys.stdout = open(1, "w", errors=sys.stdout.errors, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors=sys.stderr.errors, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order["environ"])
    sys.argv[1:] = order["arguments"]
    tempfile.tempdir = None
    give_spares(order["spares"])
    _tell(told, os.getpid())
    os.close(told)


def _commands() -> None:
    """Import what the command line imports when a command is called."""
    import batchinfer.cli

    for module in pkgutil.iter_modules(batchinfer.cli.__path__, "batchinfer.cli."):
        importlib.import_module(module.name)
    for name in ("aiobotocore.session", "s3fs", "tokenizers", "polars"):
        importlib.import_module(name)


def _read_for_s3() -> None:
    """The files of packages that each S3 client reads anew, a third of what a small run costs:
    descriptions of the services, and certificates.
    """
    import botocore.loaders
    import botocore.session
    from aiobotocore.httpsession import AIOHTTPSession

    create, loader = botocore.loaders.create_loader, botocore.loaders.create_loader()
    botocore.session.create_loader = lambda path=None: create(path) if path else loader
    given = {"region_name": "us-east-1", "aws_access_key_id": "-", "aws_secret_access_key": "-"}
    botocore.session.Session().create_client("s3", **given)
    build = AIOHTTPSession._build_verify_context
    context = build(AIOHTTPSession())
    AIOHTTPSession._build_verify_context = lambda self: (
        context if self._verify is True else build(self)
    )


def _fake() -> Callable[[], None]:
    from tests.support import fake_run

    _commands()
    _read_for_s3()
    return fake_run.run


def _real() -> Callable[[], None]:
    """Not what building an engine imports, as that depends on the model."""
    from batchinfer.cli import main
    from batchinfer.engine.vllm.setup import prepare_environment

    prepare_environment(weights_bytes=0, is_local_model=True)
    from batchinfer.engine.vllm.engine import import_engine

    import_engine()
    _commands()
    return main


KINDS = {"fake": _fake, "real": _real}


def _main(kind: str, descriptor: str) -> None:
    channel = socket.socket(fileno=int(descriptor))
    command = KINDS[kind]()
    gc.collect()
    gc.freeze()
    if run := _serve(channel, command):
        gc.unfreeze()
        run()


if __name__ == "__main__":
    _main(*sys.argv[1:])
