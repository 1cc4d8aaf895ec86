"""The vocabulary of a GGUF file: texts to token ids and back, as llama.cpp computes them.

Nothing changes after construction, so several threads may use it. Must not know: prompts, rows.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchinfer.errors import ConfigError
from batchinfer.llama_cpp.library import last_errors, library
from batchinfer.llama_cpp.probe import check_loadable

Int32Array = npt.NDArray[np.int32]

_MAX_PIECE_BYTES = 1024


class Vocabulary:
    """Loaded without weights, in milliseconds. Raises ConfigError if llama.cpp cannot."""

    def __init__(self, file: str) -> None:
        self._lib = library()
        check_loadable(file)
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        last_errors.clear()
        self._model = self._lib.llama_model_load_from_file(str(Path(file)).encode(), params)
        if not self._model:
            raise ConfigError(
                f"llama.cpp cannot read the tokenizer in {file}: {load_error()}. Take another file "
                "of the model, or give a tokenizer's folder as model.tokenizer"
            )
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.size = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    def tokenize(self, text: str, *, add_special: bool) -> Int32Array:
        """Token ids; names of special tokens in the text become those tokens."""
        content = text.encode("utf-8", "surrogatepass")
        room = len(content) + 16
        while True:
            ids = np.empty(room, np.int32)
            num = self._lib.llama_tokenize(
                self._vocab, content, len(content), ids.ctypes.data, room, add_special, True
            )
            if num >= 0:
                return ids[:num].copy()
            room = -num

    def text(self, token_id: int) -> str:
        """A token as the file spells it."""
        return (self._lib.llama_vocab_get_text(self._vocab, token_id) or b"").decode(
            "utf-8", "replace"
        )

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token; of a special one none."""
        return [self._piece(token_id) for token_id in range(self.size)]

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a completion: of the text, of a turn."""
        is_end = self._lib.llama_vocab_is_eog
        return frozenset(i for i in range(self.size) if is_end(self._vocab, i))

    @property
    def bos_text(self) -> str:
        token_id = self._lib.llama_vocab_bos(self._vocab)
        return self.text(token_id) if token_id >= 0 else ""

    @property
    def eos_text(self) -> str:
        token_id = self._lib.llama_vocab_eos(self._vocab)
        return self.text(token_id) if token_id >= 0 else ""

    def _piece(self, token_id: int) -> bytes:
        room = _MAX_PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            num = self._lib.llama_token_to_piece(self._vocab, token_id, buffer, room, 0, False)
            if num >= 0:
                return buffer.raw[:num]
            room = -num


def load_error() -> str:
    """What llama.cpp said last of a file that it could not load."""
    words = [line for line in last_errors if "error loading model" in line] or last_errors
    return (
        words[-1].rpartition(": error loading model: ")[2].strip()
        if words
        else "it gives no reason"
    )
