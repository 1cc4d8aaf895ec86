"""The engines by the name that a job gives, `engine.name`: one late import each.

Must not know: anything of an engine but where its kind is. To add one: a folder, a function here,
and its name in config's ENGINES.
"""

from __future__ import annotations

from collections.abc import Callable

from batchinfer.engine.base import EngineKind


def engine_kind(name: str) -> EngineKind:
    """The kind of a job's `engine.name`, which config has checked. Raises KeyError."""
    return KINDS[name]()


def _vllm() -> EngineKind:
    from batchinfer.engine.vllm.kind import VllmKind

    return VllmKind()


KINDS: dict[str, Callable[[], EngineKind]] = {"vllm": _vllm}
