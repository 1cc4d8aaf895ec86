"""Why a package that is there cannot be imported: a limit of the process, a variable, the package.

Must not know: which packages there are, who imports them. Invariant: no message holds a secret.
"""

from __future__ import annotations

import os
import re
import traceback

from batchinfer.errors import ConfigError
from batchinfer.limits import limit_met

#: Whose environment variables are read while packages are imported.
_LIBRARIES = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "VLLM_"),
    *("TORCH", "PYTORCH_", "TRITON_", "NUMBA_", "NVIDIA_", "CUDA_", "FLASHINFER_", "RAY_"),
)
#: Words of names whose values no message may hold.
_SECRET = frozenset({"TOKEN", "KEY", "SECRET", "PASSWORD"})


def import_failure(package: str, error: BaseException) -> ConfigError:
    """The error for a package that is there and cannot be imported, with the first cause."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if not isinstance(error, ImportError) and (frames := traceback.extract_tb(error.__traceback__)):
        reason += f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})"
    if limit := limit_met():
        return ConfigError(f"{package} cannot be imported: {reason}. {limit}")
    if not isinstance(error, ImportError) and (name := _variable_behind(str(error))):
        if is_secret(name):
            reason = reason.replace(os.environ[name], "...")
        return ConfigError(
            f"{package} cannot be imported: {reason}. A library reads the environment "
            f"variable {name} as it is imported and cannot take its value: correct it or unset it"
        )
    return ConfigError(
        f"{package} cannot be imported: {reason}. The installation or the "
        "environment is at fault, not the job or the model: reinstall the named package "
        "(`make setup` installs compatible versions)"
    )


def is_secret(variable: str) -> bool:
    """Whether no message may hold the value of this environment variable."""
    return bool(_SECRET & set(variable.split("_")))


def _variable_behind(message: str) -> str | None:
    """The environment variable of a library that a message names, or whose whole value it quotes:
    most say which value they cannot read, and not where they have it from.
    """
    for name in sorted(name for name in os.environ if name.startswith(_LIBRARIES)):
        value = os.environ[name].strip()
        quoted = (repr(value), f"'{value}'", f'"{value}"', f"`{value}`")
        is_last = re.search(f": {re.escape(value)}([,.;]|$)", message, re.MULTILINE)
        if value and (name in message or is_last or any(form in message for form in quoted)):
            return name
    return None
