"""Which encoder reads a model's tokenizer. Must not know: texts, token ids."""

from __future__ import annotations

from pathlib import Path

from batchinfer.prompt.encode import TokenEncoder


def load_encoder(path: str, *, trust_remote_code: bool = False) -> TokenEncoder:
    """The tokenizer in a folder, or in a GGUF file. Raises ConfigError if it cannot be loaded."""
    if Path(path).is_file():
        # Needs llama.cpp, which is not always there.
        from batchinfer.prompt.gguf_encoder import GgufEncoder

        return GgufEncoder(path)
    return TokenEncoder(path, trust_remote_code=trust_remote_code)
