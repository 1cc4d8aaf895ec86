"""Which versions this process runs, as text."""

from __future__ import annotations

import platform
from importlib import metadata

from batchinfer import __version__
from batchinfer.config import ENGINES
from batchinfer.engine.kinds import engine_kind

_PACKAGES = ("torch", "transformers", "pyarrow", "polars", "s3fs")


def program_version() -> str:
    return f"batchinfer {__version__}, Python {platform.python_version()}, {platform.platform()}"


def package_versions() -> str:
    return ", ".join(f"{name} {_version(name) or 'not installed'}" for name in _PACKAGES)


def engine_versions() -> str:
    """Of the packages of all engines, as far as they are installed."""
    names = dict.fromkeys(name for engine in ENGINES for name in engine_kind(engine).packages())
    found = {name: _version(name) for name in names}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
