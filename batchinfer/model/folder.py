"""The files of a model folder: where it is, what belongs to the tokenizer, hashes.

Must not know: what the settings in the files mean.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from batchinfer.errors import ConfigError
from batchinfer.quantization import METHODS, is_gguf, read_gguf
from batchinfer.storage import local_path
from batchinfer.storage.hub import hub_files
from batchinfer.storage.local_errors import os_errors

_TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
#: What is downloaded of a model on the hub.
_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
_TOKENIZER_SETTING_NAMES = (
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def resolve_folder(path: str, key: str, revision: str | None) -> Path:
    """The local folder of a path or hub name, downloaded if need be; of a GGUF file that file."""
    if "://" in path:
        raise ConfigError(
            f"{key} {path}: models are read from a local folder. Download it first "
            "(for S3: aws s3 sync) and give the folder"
        )
    folder = local_path(path)
    with os_errors("read", folder):
        is_folder, is_there = folder.is_dir(), folder.exists()
    if is_folder:
        return folder.absolute()
    if is_there:
        if is_gguf(folder):
            return folder.absolute()
        if not folder.is_file():
            raise ConfigError(f"{key} {path} is neither a folder nor a regular file")
        if folder.suffix == ".gguf":
            raise ConfigError(
                f"{key} {path} is no GGUF file, whose first bytes are GGUF: it is empty, damaged "
                "or of another kind; copy it again"
            )
        raise ConfigError(f"{key} {path} is a file: give the folder with config.json and weights")
    if folder.suffix == ".gguf":
        raise ConfigError(f"{key}: there is no file {folder.absolute()}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        raise ConfigError(f"{key}: there is no folder {folder.absolute()}")
    what = f"{key} {path}: there is no such local folder"
    return hub_files(what, path, _PATTERNS, revision=revision)


def has_chat_template(tokenizer: Path) -> bool:
    """Whether the files of a tokenizer bring a chat template."""
    if tokenizer.is_file():
        return bool(read_gguf(tokenizer).metadata.get("tokenizer.chat_template"))
    if any((tokenizer / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return bool(read_optional_json(tokenizer / "tokenizer_config.json").get("chat_template"))


def read_json(path: Path, why: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing ({why}). Copy the whole model folder") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check its mode") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Copy it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object. Copy it again")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, "") if path.exists() else {}


def require_tokenizer(folder: Path) -> None:
    if not any((folder / name).exists() for name in _TOKENIZER_NAMES):
        raise ConfigError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZER_NAMES[:2])}, …): copy it there, or "
            "give its folder as model.tokenizer"
        )


def content_digest(folder: Path, tokenizer_folder: Path) -> dict[str, str]:
    """sha256 of each file that decides what a prompt becomes and how the model computes."""
    own_files = [method.settings_file for method in METHODS if method.settings_file]
    names = ["config.json", "generation_config.json", *own_files]
    files = [folder / name for name in names] + sorted(folder.glob("*.py"))
    tokenizer_names = (*_TOKENIZER_NAMES, *_TOKENIZER_SETTING_NAMES)
    of_tokenizer = [tokenizer_folder / name for name in tokenizer_names]
    digest = {file.name: file_sha256(file) for file in files if file.exists()}
    prefix = "" if tokenizer_folder == folder else "tokenizer/"
    digest |= {prefix + file.name: file_sha256(file) for file in of_tokenizer if file.exists()}
    return digest


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
