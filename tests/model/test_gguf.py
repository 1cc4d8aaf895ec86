"""What a GGUF file says of its model, and which jobs take it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from batchinfer.cli.engines import engine_for
from batchinfer.errors import ConfigError
from batchinfer.model import changed_weights, weight_marks
from batchinfer.quantization import Machine
from tests.support.gguf import make_gguf
from tests.support.jobs import MODEL
from tests.support.models import read_model

LLAMA = Machine("cpu", engine="llama_cpp")
VLLM = Machine("cpu", engine="vllm")


def write_split(folder: Path, parts: list[dict[str, int]]) -> Path:
    """Two files of one small model: their tensors, and what each says of itself."""
    for number, said in enumerate(parts, 1):
        writer = gguf.GGUFWriter(folder / f"m-{number:05}-of-00002.gguf", "llama")
        for key, value in said.items():
            writer.add_uint16(f"split.{key}", value)
        if number == 1:
            for key in ("context_length", "embedding_length", "block_count", "vocab_size"):
                writer.add_uint32(f"llama.{key}", 32)
            writer.add_uint32("llama.attention.head_count", 2)
        writer.add_tensor(f"blk.{number}.ffn_up.weight", np.zeros((32, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder / "m-00001-of-00002.gguf"


def test_facts_are_the_files_own(demo_gguf: Path) -> None:
    """Those of the folder that it was made of, where they are the same."""
    found, folder = read_model(str(demo_gguf), machine=LLAMA), read_model(str(MODEL))
    assert (found.path, found.tokenizer_path) == (str(demo_gguf), str(demo_gguf))
    assert (found.quantization, found.dtype) == ("gguf", "float32")
    assert found.notes == ("the file's weights are F32",)
    assert (found.max_model_len, found.vocab_size) == (2048, 4096)
    assert found.eos_token_ids == folder.eos_token_ids
    assert found.weights_bytes == demo_gguf.stat().st_size
    assert found.kv_bytes_per_token == 2 * folder.kv_bytes_per_token  # in float32
    assert set(found.digest) == {"tokenizer.gguf", "weights"}


@pytest.mark.parametrize(("kind", "dtype"), [("q8_0", "float32"), ("f16", "float16")])
def test_another_type_is_another_model(
    kind: str, dtype: str, demo_gguf: Path, tmp_path: Path
) -> None:
    make_gguf(MODEL, tmp_path / "model.gguf", kind)
    found, other = (read_model(str(p), machine=LLAMA) for p in (tmp_path, demo_gguf))
    assert found.dtype == dtype
    assert found.path == str(tmp_path / "model.gguf"), "the only model of a folder"
    assert found.digest["weights"] != other.digest["weights"]
    assert found.digest["tokenizer.gguf"] == other.digest["tokenizer.gguf"]


def test_weights_that_were_replaced_are_noticed(demo_gguf: Path, tmp_path: Path) -> None:
    """Of the same shapes and types, so that the header is the same."""
    file = Path(shutil.copy(demo_gguf, tmp_path / "model.gguf"))
    marks = weight_marks(str(file))
    assert list(marks) == ["model.gguf"]
    assert changed_weights(str(file), marks) == []
    content = bytearray(file.read_bytes())
    content[-100_000:] = bytes(100_000)
    file.write_bytes(content)
    assert changed_weights(str(file), marks) == ["model.gguf"]


def test_a_model_in_several_files_is_read_as_one(tmp_path: Path) -> None:
    said = [{"no": n, "count": 2} for n in (0, 1)]
    file = write_split(tmp_path, said)
    found = read_model(str(tmp_path), machine=LLAMA)
    assert found.path == str(file)
    assert found.weights_bytes == sum(f.stat().st_size for f in tmp_path.glob("*.gguf"))
    assert sorted(weight_marks(str(file))) == [f.name for f in sorted(tmp_path.glob("*.gguf"))]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([{"no": 0, "count": 3}, {"no": 1, "count": 3}], "in 3 files, and its name"),
        ([{"no": 1, "count": 2}, {"no": 0, "count": 2}], "not of one model"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    said: list[dict[str, int]], words: str, tmp_path: Path
) -> None:
    file = write_split(tmp_path, said)
    with pytest.raises(ConfigError, match=words):
        read_model(str(file), machine=LLAMA)


def test_a_folder_with_two_models_asks_for_one(demo_gguf: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(demo_gguf, tmp_path / name)
    with pytest.raises(ConfigError, match=r"2 GGUF models \(a.gguf, b.gguf, …\): name one"):
        read_model(str(tmp_path), machine=LLAMA)


def test_each_engine_is_given_the_models_that_it_reads(demo_gguf: Path) -> None:
    with pytest.raises(ConfigError, match=r"vLLM reads no GGUF files here, and engine.name: llam"):
        read_model(str(demo_gguf), machine=VLLM)
    with pytest.raises(ConfigError, match=r"llama.cpp reads only GGUF files; `batchinfer quant"):
        read_model(str(MODEL), machine=LLAMA)
    with pytest.raises(ConfigError, match="quantization is int8, but the checkpoint is GGUF"):
        read_model(str(demo_gguf), machine=LLAMA, quantization="int8")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general.type": "adapter"}, "is a LoRA adapter"),
        ({"general.type": "mmproj"}, "that sees images"),
        ({"llama.attention.causal": False}, "generates no text from left to right"),
        ({}, "does not say its context_length"),
    ],
)
def test_what_is_not_a_language_model_is_refused(
    keys: dict[str, str | bool], words: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for key, value in keys.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_string)(key, value)
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=words):
        read_model(str(tmp_path / "x.gguf"), machine=LLAMA)


def test_what_only_has_the_name_of_a_gguf_file_is_not_one(tmp_path: Path) -> None:
    """A pipe is not waited for."""
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "other.gguf").write_bytes(b"<!DOCTYPE html>")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("empty", "other"):
        with pytest.raises(ConfigError, match=f"{name}.gguf is no GGUF file.* copy it again"):
            read_model(str(tmp_path / f"{name}.gguf"))
    with pytest.raises(ConfigError, match="neither a folder nor a regular file"):
        read_model(str(tmp_path / "pipe.gguf"))
    assert engine_for(str(tmp_path / "pipe.gguf")) is None
