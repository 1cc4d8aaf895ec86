"""What runs in vLLM's own processes: they outlive a scheduler's signal, and never outlive us.

Loaded by vLLM itself (entry point `vllm.general_plugins`), after its worker set its own handlers.
Does nothing except in processes below an engine of ours, so other users of the same environment
never notice it. Must not know: the rest of the package beyond two variables and the signals.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import multiprocessing
import os
import signal
import threading

from batchinfer.engine.vllm.failure import tell_failures
from batchinfer.engine.vllm.setup import OWNER_PID_VARIABLE, PLUGINS_VARIABLE
from batchinfer.signals import STOP_CODES

PR_SET_PDEATHSIG = 1
#: Where and how a worker of vLLM says that a call failed; 0.26 to 0.33.
WORKER_LOGGER = "vllm.v1.executor.multiproc_executor"
FAILED_CALL = "WorkerProc hit an exception"
#: For the reason to reach the engine, where it listens to this very worker.
_LAST_WORDS_S = 2.0


class EndWithFailedCall(logging.Handler):
    """Ends a worker whose call failed.

    vLLM lets it live and listens to its workers in turn, or to one of them alone: where another one
    waits for this one in a collective operation, nobody hears of the failure, and the engine hangs
    forever (seen: the second of two GPUs ran out of memory). It does hear of a death.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(FAILED_CALL):
            timer = threading.Timer(_LAST_WORDS_S, os._exit, (1,))
            timer.daemon = True
            timer.start()


def register() -> None:
    """Tie this process to its parent's life and make it deaf to the signals meant for the run.

    A scheduler signals the whole process group, and the engine has to outlive the flush. The kernel
    sends the death signal when the thread that spawned this process ends, so engines are built in a
    thread that stays (the main one).
    """
    owner_pid = os.environ.get(OWNER_PID_VARIABLE)
    if owner_pid is None:
        return
    for module in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(",")):
        importlib.import_module(module)  # which registers itself with vLLM
    if int(owner_pid) == os.getpid():
        return
    for number in STOP_CODES:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os.kill(os.getpid(), signal.SIGKILL)  # it died before the line above
    logging.getLogger(WORKER_LOGGER).addHandler(EndWithFailedCall())
    tell_failures()

    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import torch

        torch.cpu._init_amx()  # without it the first small bf16 batch dies of SIGILL
