"""Processes that a fork starts itself (servers, replicas, workers of vLLM), without their imports.

Before a fork runs anything it makes children that wait, each as its parent found itself: what was
imported, and nothing else. When it starts Python, one of them becomes that process. So it is its
child as any other, with the files, environment, group and exit code of a process of its own, in
which a module runs as `__main__`. As with any fork, what is read when a process begins or a library
is imported (LD_PRELOAD, OMP_NUM_THREADS) is not read again.
"""

from __future__ import annotations

import fcntl
import gc
import inspect
import json
import multiprocessing.util
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_MAX_ORDER_BYTES = 1 << 17
_MAX_FILES = 64
#: How the processes that are meant begin: modules of ours, and what multiprocessing spawns.
_MODULES = ("batchinfer.", "tests.")
_SPAWNED = "from multiprocessing.spawn "


class _Spare(NamedTuple):
    pid: int
    channel: socket.socket


def forked() -> int:
    with warnings.catch_warnings():  # of threads: Arrow's, OpenBLAS's, which know of forks
        warnings.simplefilter("ignore")
        return os.fork()


def run_python(arguments: Sequence[str]) -> None:
    """What `python ARGUMENTS` does: with -m, with -c, or with a file."""
    first, *rest = arguments
    if first == "-m":
        sys.argv[:] = rest
        said = "'.*' found in sys.modules"  # as other imports need it, too
        warnings.filterwarnings("ignore", said, RuntimeWarning)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, os.path.dirname(first))  # noqa: PTH120
        runpy.run_path(first, run_name="__main__")


def give_spares(counts: Sequence[int]) -> None:
    """As many children as the first of `counts`, each of which gets the others of it."""
    if not counts or not counts[0]:
        return
    made: list[_Spare] = []
    for _ in range(counts[0]):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = forked()
        if pid == 0:
            for channel in (ours, *(spare.channel for spare in made)):
                channel.close()
            _become(theirs, counts[1:])
        theirs.close()
        made.append(_Spare(pid, ours))
    _use(made)


def _use(spares: list[_Spare]) -> None:
    """Have what starts Python from here on take them, until none is left."""
    execute, spawn = subprocess.Popen._execute_child, multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]

    def execute_child(self: Any, *arguments: Any, **options: Any) -> None:
        asked = inspect.signature(execute).bind(self, *arguments, **options).arguments
        python = _meant(asked["args"])
        if python is None or not spares:
            execute(self, *arguments, **options)
            return
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        files = {fd: fd for fd in asked["pass_fds"]}
        for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
            files[number] = number if asked[name] == -1 else asked[name]
        self.pid = _order(
            spares.pop(0), python, files, asked["env"], asked["cwd"], asked["start_new_session"]
        )
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in pipes))

    def spawnv_passfds(path: Any, arguments: Sequence[Any], passed: Sequence[int]) -> int:
        python = _meant([os.fsdecode(argument) for argument in arguments])
        if python is None or not spares:
            return int(spawn(path, arguments, passed))
        return _order(spares.pop(0), python, {fd: fd for fd in (0, 1, 2, *map(int, passed))})

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = spawnv_passfds  # type: ignore[attr-defined]


def _meant(command: Any) -> list[str] | None:
    """The arguments of Python, without its options, if the command starts what a spare is for."""
    if not isinstance(command, list | tuple) or os.fspath(command[0]) != sys.executable:
        return None
    for index, word in enumerate(command):
        what = str(command[index + 1]) if index + 1 < len(command) else ""
        if (word == "-m" and what.startswith(_MODULES)) or (
            word == "-c" and what.startswith(_SPAWNED)
        ):
            return [str(argument) for argument in command[index:]]
    return None


def _order(
    spare: _Spare,
    arguments: Sequence[str],
    files: Mapping[int, int],
    environ: Mapping[str, str] | None = None,
    cwd: Any = None,
    is_leader: bool = False,
) -> int:
    """Have it run Python with these arguments. `files`: its descriptors -> ours."""
    order = {
        "arguments": list(arguments),
        "files": list(files),
        "environ": dict(os.environ if environ is None else environ),
        "cwd": str(cwd or Path.cwd()),
        "is_leader": is_leader,
    }
    with spare.channel:
        socket.send_fds(spare.channel, [json.dumps(order).encode()], list(files.values()))
    return spare.pid


def _become(channel: socket.socket, counts: Sequence[int]) -> NoReturn:
    """Wait for an order, or for the end of whoever could give one."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # so that what the parent writes to ends with it
        os.dup2(nowhere, number)
    message, given, _, _ = socket.recv_fds(channel, _MAX_ORDER_BYTES, _MAX_FILES)
    if not message:
        os._exit(0)
    channel.close()
    order = json.loads(message)
    free = 1 + max(order["files"])
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, free) for fd in given]
    for number in order["files"]:
        os.dup2(above[order["files"].index(number)], number)
    for fd in (*above, *(fd for fd in given if fd not in order["files"]), nowhere):
        if fd not in order["files"]:
            os.close(fd)
    if order["is_leader"]:
        os.setsid()
    os.chdir(order["cwd"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", errors=sys.stdout.errors, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors=sys.stderr.errors, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order["environ"])
    tempfile.tempdir = None
    give_spares(counts)
    gc.unfreeze()
    run_python(order["arguments"])
    raise SystemExit(0)  # through the frames of the parent's, which are below ours
