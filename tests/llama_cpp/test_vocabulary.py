"""Texts to tokens through llama.cpp, beside the library that the model came with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer

from batchinfer.errors import ConfigError
from batchinfer.llama_cpp.vocabulary import Vocabulary
from batchinfer.prompt.gguf_encoder import GgufEncoder
from tests.support.jobs import MODEL, ROOT

TEXTS = [
    "", " ", "a", "  two  spaces\n\n\nand lines\t", "don't we'll I'M", "2026-11-30 1234567",
    "naïve café — ünïcödé", "日本語のテキスト", "😀👩‍👩‍👧 emoji", "x" * 500,
    "<|im_start|>user<|im_end|>", "a<|endoftext|>b", "tabs\tand\r\nreturns\u00a0\u200b",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(demo_gguf: Path) -> GgufEncoder:
    return GgufEncoder(str(demo_gguf))


@pytest.fixture(scope="module")
def theirs() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def texts() -> list[str]:
    return TEXTS + pl.read_parquet(ROOT / "jobs/demo/prompts/*.parquet")["description"].to_list()


def test_tokens_are_those_of_the_models_own_tokenizer(
    encoder: GgufEncoder, theirs: Tokenizer
) -> None:
    given = texts()
    found = encoder.encode(given, add_special_tokens=True)
    assert [ids.tolist() for ids in found] == [e.ids for e in theirs.encode_batch_fast(given)]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in found])])
    decoded = encoder.decode(np.concatenate(found), offsets)
    assert decoded == theirs.decode_batch([ids.tolist() for ids in found])


def test_spans_of_tokens_are_theirs(encoder: GgufEncoder, theirs: Tokenizer) -> None:
    """Where a text spells no special token: a cut falls between the same characters."""
    given = [text for text in texts() if "<|" not in text]
    for text, spans in zip(given, encoder.spans(given), strict=True):
        expected = theirs.encode(text, add_special_tokens=False).offsets
        assert spans.tolist() == [list(span) for span in expected], text


def test_a_file_without_a_vocabulary_that_llama_cpp_knows_is_refused(
    demo_gguf: Path, tmp_path: Path
) -> None:
    content = demo_gguf.read_bytes()
    file = tmp_path / "odd.gguf"
    file.write_bytes(content.replace(b"gpt2", b"gptX", 1))
    with pytest.raises(ConfigError, match=r"cannot read the tokenizer in .*odd\.gguf: .*gptX"):
        Vocabulary(str(file))


def test_a_file_on_which_llama_cpp_ends_its_process_is_refused(
    demo_gguf: Path, tmp_path: Path
) -> None:
    """Which it does for a token that is there twice; this process lives on."""
    content = demo_gguf.read_bytes()
    file = tmp_path / "twice.gguf"
    twice = content.replace(b"\x01\x00\x00\x00\x00\x00\x00\x00a", b"\x01" + bytes(7) + b"b", 1)
    file.write_bytes(twice)
    with pytest.raises(ConfigError, match=r"twice\.gguf cannot be loaded: .*SIGABRT: llama-vocab"):
        Vocabulary(str(file))
