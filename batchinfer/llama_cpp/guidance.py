"""JSON schemas and regular expressions as samplers: LLGuidance, as xllamacpp has it in llama.cpp.

Where LLGuidance cannot read a constraint it writes a line to stderr, and the sampler then lets
every token through: so each is tried in a process of its own first, whose stderr can be read.
`python -m batchinfer.llama_cpp.guidance FILE KIND`, with the constraint on stdin, is that process.
Must not know: jobs.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

from batchinfer.llama_cpp.library import library

_MARK = "llg error: "
_PASSES_ALL = 3  # exit code


class _Token(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float)]


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.POINTER(_Token)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("is_sorted", ctypes.c_bool),
    ]


def guidance_sampler(vocab: Any, kind: str, constraint: str) -> Any:
    """`kind`: json or regex. The sampler of a constraint that `why_unreadable` has none against."""
    create = library()._Z22llama_sampler_init_llgPK11llama_vocabPKcS3_
    create.restype = ctypes.c_void_p
    create.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)
    return create(vocab, kind.encode(), constraint.encode())


def why_unreadable(file: str, kind: str, constraint: str) -> str | None:
    """What LLGuidance cannot read of a constraint, in its words; None: nothing. About 0.3 s."""
    tried = subprocess.run(
        [sys.executable, "-m", __name__, file, kind],
        input=constraint.encode(),
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        check=False,
    )
    if tried.returncode == 0:
        return None
    words = tried.stderr.decode("utf-8", "replace")
    lines = [line.strip() for line in words.partition(_MARK)[2].splitlines() if line.strip()]
    return lines[0] if lines else f"it ended with {tried.returncode}"


def _try(file: str, kind: str, constraint: str) -> int:
    """Whether the sampler forbids any token at the start; one that was not made forbids none."""
    lib = library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    vocab = lib.llama_model_get_vocab(lib.llama_model_load_from_file(file.encode(), params))
    sampler = guidance_sampler(vocab, kind, constraint)
    size = lib.llama_vocab_n_tokens(vocab)
    tokens = (_Token * size)(*[_Token(token_id, 0.0, 0.0) for token_id in range(size)])
    lib.llama_sampler_apply.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    lib.llama_sampler_apply.restype = None
    lib.llama_sampler_apply(sampler, ctypes.byref(_Tokens(tokens, size, -1, False)))
    return 0 if any(token.logit < 0 for token in tokens) else _PASSES_ALL


if __name__ == "__main__":
    status = _try(sys.argv[1], sys.argv[2], sys.stdin.read())
    sys.stdout.flush()
    os._exit(status)
