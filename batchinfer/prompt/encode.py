"""Text to token ids and back, in batches, on the tokenizer's own threads.

Must not know: rows, templates. Fast tokenizers are called below transformers' wrapper, whose
bookkeeping costs as much as the encoding; nothing of the tokenizer changes after construction, so
several threads may use it. Encodings are large (about 100 bytes a token): a batch is 1 MiB of text.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.errors import ConfigError
from batchinfer.prompt.token_bytes import TokenBytes, token_bytes_of

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_BATCH_CHARS = 1024 * 1024
_BATCH_TOKENS = 256 * 1024


class TokenEncoder:
    """A loaded tokenizer. Raises ConfigError if it cannot be loaded."""

    def __init__(self, path: str, *, trust_remote_code: bool = False) -> None:
        self.tokenizer = _load(path, trust_remote_code=trust_remote_code)
        self._backend: Any = None
        if self.tokenizer.is_fast:
            self._backend = self.tokenizer.backend_tokenizer
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self.tokenizer.split_special_tokens
        self._lock = threading.Lock()  # tokenizers in Python promise nothing about threads

    @cached_property
    def _token_bytes(self) -> TokenBytes | None:
        """Made when first needed: 0.2 s for a vocabulary of 150,000."""
        return None if self._backend is None else token_bytes_of(self._backend)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Int32Array]:
        """Token ids of each text."""
        found: list[Int32Array] = []
        for batch in _batches([len(text) for text in texts], _BATCH_CHARS):
            if self._backend is not None:
                encodings = self._backend.encode_batch_fast(
                    texts[batch], add_special_tokens=add_special_tokens
                )
                found.extend(np.array(encoding.ids, dtype=np.int32) for encoding in encodings)
            else:
                with self._lock:
                    encoded = self.tokenizer(
                        list(texts[batch]), add_special_tokens=add_special_tokens, verbose=False
                    )
                found.extend(np.array(ids, dtype=np.int32) for ids in encoded["input_ids"])
        return found

    def spans(self, texts: Sequence[str]) -> list[Int64Array]:
        """[num_tokens, 2] of each text: where in the text its tokens start and end, in characters.

        Of a tokenizer that does not tell, as if all tokens were equally long.
        """
        if self._backend is None:
            counts = [len(ids) for ids in self.encode(texts, add_special_tokens=False)]
            return [_even_spans(len(t), count) for t, count in zip(texts, counts, strict=True)]
        found: list[Int64Array] = []
        for batch in _batches([len(text) for text in texts], _BATCH_CHARS):
            encodings = self._backend.encode_batch(texts[batch], add_special_tokens=False)
            found.extend(
                np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) for encoding in encodings
            )
        return found

    def decode(self, token_ids: Int32Array, offsets: Int64Array) -> list[str]:
        """Text of each [offsets[i], offsets[i + 1]) without special tokens."""
        if self._token_bytes is not None:
            return self._token_bytes.decode(token_ids, offsets)
        texts: list[str] = []
        for batch in _batches(np.diff(offsets).tolist(), _BATCH_TOKENS):
            bounds = zip(
                offsets[batch.start : batch.stop],
                offsets[batch.start + 1 : batch.stop + 1],
                strict=True,
            )
            sequences = [token_ids[start:stop].tolist() for start, stop in bounds]
            if self._backend is not None:
                texts.extend(self._backend.decode_batch(sequences, skip_special_tokens=True))
            else:
                with self._lock:
                    texts.extend(
                        self.tokenizer.decode(
                            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                        )
                        for ids in sequences
                    )
        return texts


def _load(path: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a bad file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the tokenizer in {path} cannot be loaded: {reason}. Copy its files again, or give "
            "another folder as model.tokenizer"
        ) from error


def _batches(sizes: Sequence[int], max_size: int) -> Iterator[slice]:
    """Consecutive runs of at most `max_size` in sum, or of one entry."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > max_size:
            yield slice(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def _even_spans(num_chars: int, num_tokens: int) -> Int64Array:
    bounds = np.arange(num_tokens + 1, dtype=np.int64) * num_chars // max(1, num_tokens)
    return np.stack([bounds[:-1], bounds[1:]], axis=1)
