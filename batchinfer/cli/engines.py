"""Which engine a job that names none gets for its model.

Must not know: how an engine runs, what each can. A job file names its engine, or means the default.
"""

from __future__ import annotations

from batchinfer.config import DEFAULT_ENGINE, ENGINES
from batchinfer.errors import ConfigError
from batchinfer.model.gguf import find_gguf
from batchinfer.quantization import DeviceSupport, Machine, is_gguf, support_of
from batchinfer.storage import local_path

_SCHEME_OF_FILES = "gguf"


def engine_for(model: str) -> str | None:
    """The first engine that runs the model; None: the default does, or none."""
    try:
        file = find_gguf(local_path(model))
    except (ConfigError, OSError):  # said where the model is read
        return None
    if file is None or not is_gguf(file):
        return None
    engines = [name for name in ENGINES if _runs(name, _SCHEME_OF_FILES)]
    return None if DEFAULT_ENGINE in engines else next(iter(engines), None)


def _runs(engine: str, scheme: str) -> bool:
    """On some device."""
    names = support_of(Machine(None, engine=engine)).names.values()
    return any(isinstance(name, DeviceSupport) and scheme in name.schemes for name in names)
