"""Text to token ids and back, in batches, on the tokenizer's own threads.

Must not know: rows, templates. Fast tokenizers are called below transformers' wrapper, whose
bookkeeping costs as much as the encoding; nothing of the tokenizer changes after construction, so
several threads may use it. Encodings are large (about 100 bytes a token, and 30 a character): a
batch is 1 MiB of text, and of a text far longer than a prompt can be `bounded` leaves one end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchinfer.errors import ConfigError
from batchinfer.imports import import_failure
from batchinfer.prompt.token_bytes import TokenBytes, read_token_bytes

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_BATCH_CHARS = 1024 * 1024
_BATCH_TOKENS = 256 * 1024
_MIN_SLICE_CHARS = 64 * 1024
_SLICE_CHARS_PER_TOKEN = 8  # more than texts have, so that the first slice mostly is enough


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
        return None if self._backend is None else read_token_bytes(self._backend)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Int32Array]:
        """Token ids of each text. Special tokens that a text brings itself are not added again."""
        token_ids = self._encode(texts, add_special_tokens=add_special_tokens)
        if add_special_tokens and self.affixes != ([], []):
            return [_once(ids, *self.affixes) for ids in token_ids]
        return token_ids

    @property
    def appended_text(self) -> str:
        """The special tokens that are put behind each text."""
        _, after = self.affixes
        return "".join(self.tokenizer.convert_ids_to_tokens(after)) if after else ""

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, with those that were added."""
        if self._backend is not None:
            return dict(self._backend.get_vocab(with_added_tokens=True))
        return dict(self.tokenizer.get_vocab())

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]]:
        """The special tokens that are put before and behind a text."""
        whole, bare = (
            self._encode(["a"], add_special_tokens=adds)[0].tolist() for adds in (True, False)
        )
        for start in range(len(whole) - len(bare) + 1):
            stop = start + len(bare)
            if whole[start:stop] == bare:
                return whole[:start], whole[stop:]
        return [], []

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Id -> text of the tokens that stand for no text of a row."""
        if self._backend is not None:
            added = self._backend.get_added_tokens_decoder()
            return {index: token.content for index, token in added.items() if token.special}
        ids = self.tokenizer.all_special_ids
        return dict(zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True))

    def pieces(self, token_ids: Int32Array) -> list[tuple[str, bool]]:
        """(text, whether it is a special token) of the tokens in order; the others are joined."""
        pieces: list[tuple[str, bool]] = []
        special = self.special_tokens
        for is_special, ids in groupby(token_ids.tolist(), lambda index: index in special):
            if is_special:
                pieces.extend((special[index], True) for index in ids)
                continue
            run = np.array(list(ids), dtype=np.int32)
            pieces.append((self.decode(run, np.array([0, len(run)]))[0], False))
        return pieces

    def bounded(self, text: str, max_tokens: int, *, keeps_end: bool = False) -> str:
        """The text, or of one with far more than `max_tokens` its start (its end) with surely more.

        It is encoded in slices up to there: a slice's edge changes some tokens beside it, and
        `margin` is more than that. So the end that is left has the same first (last) `max_tokens`
        tokens as the text, and memory and time do not grow with the text.
        """
        margin = _margin(max_tokens)
        slice_chars = slice_chars_of(max_tokens)
        num_tokens = 0
        for num_chars in range(slice_chars, len(text), slice_chars):
            start = len(text) - num_chars if keeps_end else num_chars - slice_chars
            (ids,) = self._encode([text[start : start + slice_chars]], add_special_tokens=False)
            num_tokens += len(ids)
            if num_tokens > max_tokens + margin:
                return text[start:] if keeps_end else text[:num_chars]
        return text

    def _encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Int32Array]:
        token_ids: list[Int32Array] = []
        for batch in _batches([len(text) for text in texts], _BATCH_CHARS):
            if self._backend is not None:
                encodings = self._backend.encode_batch_fast(
                    texts[batch], add_special_tokens=add_special_tokens
                )
                token_ids.extend(np.array(encoding.ids, dtype=np.int32) for encoding in encodings)
            else:
                with self._lock:
                    encoded = self.tokenizer(
                        list(texts[batch]), add_special_tokens=add_special_tokens, verbose=False
                    )
                token_ids.extend(np.array(ids, dtype=np.int32) for ids in encoded["input_ids"])
        return token_ids

    def spans(self, texts: Sequence[str]) -> list[Int64Array]:
        """[num_tokens, 2] of each text: where in the text its tokens start and end, in characters.

        For a tokenizer that does not report it, as if all tokens were equally long.
        """
        if self._backend is None:
            counts = [len(ids) for ids in self.encode(texts, add_special_tokens=False)]
            return [even_spans(len(t), count) for t, count in zip(texts, counts, strict=True)]
        offsets: list[Int64Array] = []
        for batch in _batches([len(text) for text in texts], _BATCH_CHARS):
            encodings = self._backend.encode_batch(texts[batch], add_special_tokens=False)
            offsets.extend(
                np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) for encoding in encodings
            )
        return offsets

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


def check_tokenizer(folder: Path) -> None:
    """Raise ConfigError for a tokenizer.json that `TokenEncoder` could not load, in milliseconds.

    Without transformers, which takes seconds to import. Tokenizers in other files are only loaded.
    """
    if not (file := folder / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise _unusable(folder, error) from error


def _load(path: str, *, trust_remote_code: bool) -> Any:
    try:
        from transformers import AutoTokenizer
    except Exception as error:  # a package below it may raise anything while it is imported
        raise import_failure("transformers", error) from error
    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises plain Exception for a bad file
        if _is_import_failure(error):
            raise import_failure("what the tokenizer needs", error) from error
        raise _unusable(path, error) from error


def _unusable(path: str | Path, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(
        f"the tokenizer in {path} cannot be loaded: {reason}. Copy its files again, or give "
        "another folder as model.tokenizer"
    )


def _is_import_failure(error: BaseException | None) -> bool:
    """transformers imports a model's classes when they are first wanted."""
    while error is not None and not isinstance(error, ImportError):
        error = error.__cause__
    return error is not None


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


def slice_chars_of(max_tokens: int) -> int:
    """Texts of up to this many characters are not shortened by `bounded`."""
    wanted = _SLICE_CHARS_PER_TOKEN * (max_tokens + _margin(max_tokens))
    return min(max(wanted, _MIN_SLICE_CHARS), _BATCH_CHARS)


def _margin(max_tokens: int) -> int:
    return 256 + max_tokens // 16


def _once(ids: Int32Array, before: list[int], after: list[int]) -> Int32Array:
    """Without the special tokens around a text that it had already."""
    if before and ids[len(before) : 2 * len(before)].tolist() == before:
        ids = ids[len(before) :]
    if after and ids[-2 * len(after) : -len(after)].tolist() == after:
        ids = ids[: -len(after)]
    return ids


def even_spans(num_chars: int, num_tokens: int) -> Int64Array:
    bounds = np.arange(num_tokens + 1, dtype=np.int64) * num_chars // max(1, num_tokens)
    return np.stack([bounds[:-1], bounds[1:]], axis=1)
