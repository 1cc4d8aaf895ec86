"""Which engine a job that names none gets for its model.

Must not know: how an engine runs. A job file names its engine, or means the default.
"""

from __future__ import annotations

from batchinfer.errors import ConfigError
from batchinfer.model.gguf import find_gguf
from batchinfer.quantization import is_gguf
from batchinfer.storage import local_path

_OF_GGUF = "llama_cpp"


def engine_for(model: str) -> str | None:
    """The only engine that runs the model; None: it does not need a certain one."""
    try:
        file = find_gguf(local_path(model))
    except (ConfigError, OSError):  # said where the model is read
        return None
    return _OF_GGUF if file is not None and is_gguf(file) else None
