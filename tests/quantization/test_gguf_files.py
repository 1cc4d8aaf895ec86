"""GGUF headers: what is read of them, and files that llama.cpp must never be given."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import gguf
import pytest

from batchinfer.errors import ConfigError
from batchinfer.quantization import gguf_models, parts_of, read_gguf
from batchinfer.quantization.methods.gguf.files import TYPES


@pytest.fixture
def file(demo_gguf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(demo_gguf, tmp_path / "model.gguf"))


def place_of_tensor(content: bytes, name: str) -> int:
    """Where the header's entry of a tensor goes on behind its name."""
    key = struct.pack("<Q", len(name)) + name.encode()
    assert content.count(key) == 1
    return content.index(key) + len(key)


def change(file: Path, at: int, form: str, value: int) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into(form, content, at, value)
    file.write_bytes(content)


def test_the_header_is_read_as_llama_cpps_own_reader_does(demo_gguf: Path) -> None:
    found, theirs = read_gguf(demo_gguf), gguf.GGUFReader(demo_gguf)
    assert list(found.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        ours = found.tensors[tensor.name]
        assert ours.dtype == tensor.tensor_type.name
        assert ours.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert ours.num_bytes == tensor.n_bytes
    for key in ("llama.context_length", "general.architecture", "llama.rope.freq_base"):
        assert found.metadata[key] == theirs.fields[key].contents()
    assert found.metadata["tokenizer.ggml.tokens"].num == 4096


def test_sizes_of_types_are_those_of_the_gguf_package() -> None:
    theirs = {int(t): (t.name, *size) for t, size in gguf.GGML_QUANT_SIZES.items()}
    assert dict(TYPES) == theirs


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.004, 0.5, 0.9999999])
def test_a_file_that_was_cut_short_is_refused(share: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"truncated|is empty|not a GGUF file") as refused:
        read_gguf(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (0, "<I", 9, "9 dimensions"),
        (4, "<Q", 0, r"the shape \[0, 4096\]"),
        (4, "<Q", 1 << 60, "the shape"),
        (20, "<I", 4, "type 4, which this version does not know"),
        (24, "<Q", 1 << 40, "where 0 is its place"),
    ],
)
def test_a_misplaced_tensor_is_refused(
    offset: int, form: str, value: int, words: str, file: Path
) -> None:
    name = next(iter(read_gguf(file).tensors))
    assert name == "token_embd.weight"
    change(file, place_of_tensor(file.read_bytes(), name) + offset, form, value)
    with pytest.raises(ConfigError, match=words):
        read_gguf(file)


@pytest.mark.parametrize(
    ("at", "form", "value", "words"),
    [
        (4, "<I", 1, "version 1 of the GGUF format"),
        (4, ">I", 3, "big-endian"),
        (8, "<Q", 1 << 50, "counts 1125899906842624 entries"),
        (16, "<Q", 1 << 23, "truncated within its header, or damaged|a value of type|twice"),
    ],
)
def test_a_damaged_beginning_is_refused(
    at: int, form: str, value: int, words: str, file: Path
) -> None:
    change(file, at, form, value)
    with pytest.raises(ConfigError, match=words):
        read_gguf(file)


def test_no_damage_to_a_header_makes_the_reader_fail_otherwise(file: Path) -> None:
    content = file.read_bytes()
    header = content.index(b"blk.0.attn_norm.weight")
    chance = random.Random(1)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 3])):
            damaged[chance.choice([chance.randrange(header + 3000), chance.randrange(1500)])] = (
                chance.choice([0, 1, 255, chance.randrange(256)])
            )
        file.write_bytes(damaged)
        try:
            found = read_gguf(file)
        except ConfigError:
            continue
        assert sum(t.num_bytes for t in found.tensors.values()) < len(content)


def test_files_of_one_model_are_found_by_their_names(tmp_path: Path) -> None:
    for name in ("b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "a.gguf", "c.gguf.part"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert [file.name for file in gguf_models(tmp_path)] == ["a.gguf", "b-00001-of-00002.gguf"]
    names = [file.name for file in parts_of(tmp_path / "b-00002-of-00002.gguf")]
    assert names == ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]
    (tmp_path / "b-00002-of-00002.gguf").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 of the 2 files .*b-00002-of-00002\.gguf"):
        parts_of(tmp_path / "b-00001-of-00002.gguf")
