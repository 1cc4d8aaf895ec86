"""The tokenizer in a GGUF file, used through llama.cpp: neither transformers nor tokenizers needed.

Must not know: rows, engines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchinfer.llama_cpp.vocabulary import Vocabulary
from batchinfer.prompt.encode import Int32Array, Int64Array, TokenEncoder, even_spans
from batchinfer.prompt.token_bytes import TokenBytes
from batchinfer.quantization import read_gguf


class GgufEncoder(TokenEncoder):
    """See `TokenEncoder`. Raises ConfigError if llama.cpp cannot read the vocabulary."""

    def __init__(self, path: str) -> None:
        self._vocabulary = Vocabulary(path)
        self.tokenizer = GgufTokenizer(path, self._vocabulary)
        self._backend = None
        self._lock = threading.Lock()

    @property
    def _token_bytes(self) -> TokenBytes:
        if "_bytes" not in self.__dict__:
            self._bytes = TokenBytes(self._vocabulary.pieces)
        return self._bytes

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Int32Array]:
        tokenize = self._vocabulary.tokenize
        return [tokenize(text, add_special=add_special_tokens) for text in texts]

    def spans(self, texts: Sequence[str]) -> list[Int64Array]:
        return list(self._spans(texts))

    def _spans(self, texts: Sequence[str]) -> Iterator[Int64Array]:
        pieces = self._vocabulary.pieces
        for text, ids in zip(texts, self._encode(texts, add_special_tokens=False), strict=True):
            content = text.encode("utf-8", "surrogatepass")
            ends = np.cumsum([len(pieces[i]) for i in ids.tolist()] or [0], dtype=np.int64)
            excess = int(ends[-1]) - len(content)
            if len(ids) == 0 or excess not in (0, 1):  # a special token's name in the text
                yield even_spans(len(text), len(ids))
                continue
            ends = np.maximum(ends - excess, 0)  # 1: the space that is put in front
            is_start = (np.frombuffer(content, np.uint8) & 0xC0) != 0x80
            before = np.concatenate([[0], np.cumsum(is_start)])  # characters begun before a byte
            stops = before[ends]
            starts = np.concatenate([[0], ends[:-1]])
            begins_inside = np.append(~is_start, False)[starts]
            yield np.stack([before[starts] - begins_inside, stops], axis=1)


class GgufTokenizer:
    """As much of a tokenizer of transformers as chat templates ask for."""

    is_fast = False
    split_special_tokens = False

    def __init__(self, path: str, vocabulary: Vocabulary) -> None:
        self.name_or_path = path
        self._vocabulary = vocabulary
        metadata = read_gguf(Path(path)).metadata
        prefix = "tokenizer.chat_template"
        named = {
            key.removeprefix(f"{prefix}."): value
            for key, value in metadata.items()
            if key.startswith(f"{prefix}.") and isinstance(value, str)
        }
        own = metadata.get(prefix)
        self._templates: dict[str, str] = {**named, **({"default": own} if own else {})}
        self.chat_template = self._templates if named else own or None

    @property
    def special_tokens_map(self) -> dict[str, str]:
        tokens = {
            "bos_token": self._vocabulary.bos_text,
            "eos_token": self._vocabulary.eos_text,
        }
        return {name: token for name, token in tokens.items() if token}

    def get_chat_template(self, template: str | None, tools: Any = None) -> str:
        """A template by its name in the file, the text itself, or the file's own."""
        if template is not None:
            return self._templates.get(template, template)
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if (own := self._templates.get("default")) is None:
            raise ValueError("the file has no chat template")
        return own

    def get_vocab(self) -> dict[str, int]:
        return {self._vocabulary.text(i): i for i in range(self._vocabulary.size)}

    @property
    def all_special_ids(self) -> list[int]:
        pieces = self._vocabulary.pieces
        return [i for i, piece in enumerate(pieces) if not piece and self._vocabulary.text(i)]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._vocabulary.text(token_id) for token_id in ids]
