"""safetensors files changed by hand: tensors left out or renamed, headers that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Header = dict[str, dict[str, Any]]


def keep_tensors(file: Path, keep: Callable[[str], bool]) -> int:
    """Write the file anew with the tensors whose name `keep` accepts. Returns how many are gone."""
    header, body = _parts(file)
    kept: Header = {}
    content = b""
    for name, tensor in header.items():
        if name == "__metadata__":
            kept[name] = tensor
        elif keep(name):
            start, end = tensor["data_offsets"]
            content += body[start:end]
            kept[name] = tensor | {"data_offsets": [len(content) - (end - start), len(content)]}
    _write(file, kept, content)
    return len(header) - len(kept)


def change_header(file: Path, change: Callable[[Header], None]) -> None:
    """Write another header before the same bytes."""
    header, body = _parts(file)
    change(header)
    _write(file, header, body)


def _parts(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:begin]), content[begin:]


def _write(file: Path, header: Header, body: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
