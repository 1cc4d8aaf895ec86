"""The tokenizer of a GGUF file, where outputs and models are compared by theirs."""

from __future__ import annotations

from pathlib import Path

from batchinfer.evaluation.tokenizers import tokenizer_digest
from tests.support.gguf import make_gguf
from tests.support.jobs import MODEL


def test_files_of_one_tokenizer_are_equal_whatever_the_weights_are(
    demo_gguf: Path, tmp_path: Path
) -> None:
    make_gguf(MODEL, tmp_path / "small.gguf", "q8_0")
    assert tokenizer_digest(tmp_path / "small.gguf") == tokenizer_digest(demo_gguf)
    file = tmp_path / "other.gguf"
    file.write_bytes(demo_gguf.read_bytes().replace(b"smollm", b"qwen-2", 1))
    assert tokenizer_digest(file) != tokenizer_digest(demo_gguf)
