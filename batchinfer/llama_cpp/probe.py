"""Whether llama.cpp survives a file: loaded in a process of its own first.

What llama.cpp holds for impossible it does not report but ends the process for (a vocabulary with a
token twice, a shape that no architecture has). `python -m batchinfer.llama_cpp.probe FILE` is the
other process. Must not know: what is computed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache

from batchinfer.errors import ConfigError


@cache
def check_loadable(file: str) -> None:
    """Raise ConfigError for a file on which llama.cpp ends its process. Takes about 0.2 s.

    The weights are mapped, and almost none is read. What it refuses in words is found later.
    """
    ended = subprocess.run(
        [sys.executable, "-m", __name__, file],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # it would start gdb
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if ended.returncode >= 0:
        return
    lines = ended.stderr.decode("utf-8", "replace").strip().splitlines() or [""]
    name = signal.Signals(-ended.returncode).name
    raise ConfigError(
        f"{file} cannot be loaded: llama.cpp crashes on it ({name}: "
        f"{lines[0].rpartition('/')[2] or 'it gives no reason'}). The file is damaged or not a "
        "model: take another file"
    )


def _load(file: str) -> None:
    from batchinfer.llama_cpp.library import library

    lib = library()
    model_params = lib.llama_model_default_params()
    model_params.use_extra_bufts = False
    model = lib.llama_model_load_from_file(file.encode(), model_params)
    if model:
        context_params = lib.llama_context_default_params()
        context_params.n_ctx = 256
        lib.llama_init_from_model(model, context_params)


if __name__ == "__main__":
    _load(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # nothing is left to be freed
