"""The content of what a measurement is made of: files of the model and beside it, and the text.

Two measurements are one only if all of it is equal; sizes, times and shapes do not show it, as
weights are overwritten in place. Must not know: what is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from batchinfer.evaluation.record import PerplexityRequest
from batchinfer.evaluation.texts import text_of
from batchinfer.making.cached import model_hashes
from batchinfer.model.folder import file_sha256, resolve_folder
from batchinfer.storage import is_s3, local_path
from batchinfer.storage.local_errors import os_errors

#: Settings that name a folder whose content decides.
_FOLDERS = ("model.tokenizer", "model.lora")


def model_content(request: PerplexityRequest) -> dict[str, str]:
    """File -> sha256, of every file that decides what the model, its tokenizer and adapter compute.

    Large files are read once and their hashes noted. Raises ConfigError for a model or folder that
    is not there or damaged.
    """
    folder = resolve_folder(request.model, "model", request.settings.get("model.revision"))
    found = model_hashes(folder)
    for key in _FOLDERS:
        hashes = _folder_hashes(request.settings.get(key), key)
        found |= {f"{key}/{name}": value for name, value in hashes.items()}
    return found


def key_of_content(content: Mapping[str, str]) -> str:
    """A short name for it."""
    text = json.dumps(sorted(content.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def text_digest(data: str, column: str | None) -> str:
    """Digest of the content of the files; of a bucket, of its listing with sizes and versions."""
    text = text_of(data, column)
    path = local_path(text.path)
    if path.is_file():
        with os_errors("read", path):
            return file_sha256(path)
    listing = [
        (shard.name, shard.size_bytes, shard.version if is_s3(shard.url) else _sha256(shard.url))
        for shard in text.shards()
    ]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _sha256(path: str) -> str:
    with os_errors("read", path):
        return file_sha256(Path(path))


def _folder_hashes(path: Any, key: str) -> dict[str, str]:
    if not path:
        return {}
    files = sorted(f for f in resolve_folder(str(path), key, None).iterdir() if f.is_file())
    return {file.name: file_sha256(file) for file in files}
