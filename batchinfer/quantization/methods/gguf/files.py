"""GGUF files, by their first bytes."""

from __future__ import annotations

from pathlib import Path

GGUF_MAGIC = b"GGUF"


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False
