"""Detokenization of byte-level vocabularies by joining the bytes of tokens in Arrow.

The same texts as `tokenizers` gives, without its string for each token: a tenth of the time. Other
kinds of vocabulary are left to the library. Must not know: rows, encoding.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


class TokenBytes:
    """The bytes of each token id; of an id without a token, or with a special one, none."""

    def __init__(self, of_id: list[bytes]) -> None:
        self._of_id = pa.array([*of_id, b""], pa.binary())  # the last: any id past the vocabulary

    def decode(self, token_ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> list[str]:
        """Text of each [offsets[i], offsets[i + 1]). Bytes that are not UTF-8 become U+FFFD."""
        known = np.minimum(token_ids, len(self._of_id) - 1)
        _, bounds, content = self._of_id.take(pa.array(known)).buffers()
        if content is None:
            return [""] * (len(offsets) - 1)
        ends = np.frombuffer(bounds, np.int32)[offsets].tolist()
        joined = memoryview(content)
        return [str(joined[start:end], "utf-8", "replace") for start, end in pairwise(ends)]


def read_token_bytes(backend: Any) -> TokenBytes | None:
    """From a `tokenizers.Tokenizer`; None unless it spells bytes as GPT-2 did."""
    if type(backend.decoder).__name__ != "ByteLevel":
        return None
    byte_of_char = _byte_of_char()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    of_id = [b""] * (1 + max([*vocabulary.values(), *added]))
    for token, token_id in vocabulary.items():
        of_id[token_id] = _bytes(token, byte_of_char)
    for token_id, token in added.items():
        of_id[token_id] = b"" if token.special else _bytes(token.content, byte_of_char)
    return TokenBytes(of_id)


def _bytes(token: str, byte_of_char: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of_char[char] for char in token])
    except KeyError:
        return token.encode()  # an added token with a character that stands for no byte: as it is


def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling: a printable Latin-1 byte is itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
