"""Whether two outputs had one tokenizer. Figures of models with two do not compare token by token.

That both scored the same ids is not enough: a token that another vocabulary has at another place
may not occur in the text, and yet be among the likeliest. Must not know: what is compared.
Invariant: what changes no token, such as a chat template or file layout, is not a difference.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.errors import BatchInferError, ConfigError
from batchinfer.evaluation.outputs import Output
from batchinfer.model import ModelFacts
from batchinfer.model.folder import file_sha256, resolve_folder
from batchinfer.quantization import read_gguf

logger = logging.getLogger("batchinfer.evaluation")

_MAIN = "tokenizer.json"
#: Files that say which tokens there are, where there is no tokenizer.json.
_OTHERS = (
    *("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
    *("merges.txt", "added_tokens.json"),
)
#: Of tokenizer.json, what turns text into ids. The rest pads, cuts, decodes, or adds tokens that
#: are seen in what was scored.
_DECIDING = ("model", "normalizer", "pre_tokenizer", "added_tokens")
#: Of an added token, what decides where it is found.
_FLAGS = ("id", "content", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer of an output, or of a model that is to be run."""

    name: str  # whose, for messages
    files: Mapping[str, str]  # name -> sha256
    place: str  # folder or hub name

    def digest(self) -> str | None:
        """Of what it does, whatever its file looks like. None: its files are not there any more."""
        try:
            folder = resolve_folder(self.place, "model.tokenizer", None)
            there = {name: file_sha256(folder / name) for name in self.files}
            return tokenizer_digest(folder) if there == self.files else None
        except (BatchInferError, OSError, ValueError):
            return None


def of_output(output: Output) -> Tokenizer:
    """The tokenizer that made the output's prompts, as its record says."""
    model = output.job.get("model", {})
    place = str(model.get("tokenizer") or model.get("path"))
    return Tokenizer(output.url, _of_tokenizer(output.model.get("content") or {}), place)


def of_model(model: ModelFacts) -> Tokenizer:
    """The tokenizer that a model would be run with."""
    return Tokenizer(model.tokenizer_path, _of_tokenizer(model.digest), model.tokenizer_path)


def check_same_tokenizer(one: Tokenizer, other: Tokenizer) -> None:
    """Raise ConfigError for two tokenizers; warn if that can no longer be seen."""
    if one.files == other.files and one.files:
        return
    ours, theirs = one.digest(), other.digest()
    if ours is None or theirs is None:
        gone = one if ours is None else other
        logger.warning(
            "the tokenizers of %s and %s are different files, and that of %s is not at %s any "
            "more: if it has other tokens, the figures cannot be compared",
            *(one.name, other.name, gone.name, gone.place),
        )
    elif ours != theirs:
        raise ConfigError(
            f"{other.name} has another tokenizer than {one.name} (another vocabulary, merges or "
            "normalizer), so their likeliest tokens and perplexities could not be compared: "
            "evaluate each by itself and compare bits per byte"
        )


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 of what the tokenizer in a folder makes of a text, however its files are written; of a
    GGUF file of the metadata that say it.
    """
    folder = Path(folder)
    if folder.is_file():
        return read_gguf(folder).tokenizer_sha256
    if (folder / _MAIN).is_file():
        content = json.loads((folder / _MAIN).read_bytes())
        return _sha256({name: _settled(name, content.get(name)) for name in _DECIDING})
    return _sha256({n: file_sha256(folder / n) for n in _OTHERS if (folder / n).is_file()})


def _settled(name: str, value: Any) -> Any:
    """One way of writing for what means the same."""
    if name == "added_tokens":
        return sorted(({k: token.get(k) for k in _FLAGS} for token in value or []), key=str)
    if isinstance(value, dict):
        # What is off by default may be left out; merges were one text each in older files.
        return {k: _settled(k, v) for k, v in value.items() if v is not None and v is not False}
    if name == "merges" and isinstance(value, list):
        return [pair if isinstance(pair, str) else " ".join(pair) for pair in value]
    return value


def _of_tokenizer(content: Mapping[str, str]) -> dict[str, str]:
    """The files of `content` that decide, without the folder that a tokenizer of its own is in."""
    is_apart = any(name.startswith("tokenizer/") for name in content)
    prefix = "tokenizer/" if is_apart else ""
    names = [n for n in (_MAIN, *_OTHERS) if prefix + n in content]
    if _MAIN in names:
        names = [_MAIN]
    return {name: content[prefix + name] for name in names}


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
